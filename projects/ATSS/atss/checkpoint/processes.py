"""Work of the main process, whose result or error all processes of a run share."""

from typing import Any, Callable

from detectron2.utils import comm


def run_on_main(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on the main process; all processes call this, and get what it returns.

    Raises:
        OSError, ValueError: as the function raised it, on all processes.
    """
    result: Any = None
    if comm.is_main_process():
        try:
            result = function(*args)
        except (OSError, ValueError) as error:
            result = error
    result = comm.all_gather(result)[0]
    if isinstance(result, Exception):
        raise result
    return result
