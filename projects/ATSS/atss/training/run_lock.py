"""The lock of a run's folder, so that no second run writes into it."""

import contextlib
import json
import os
import socket
import tempfile
import threading
from multiprocessing.util import Finalize
from typing import Any, Dict, Iterator, Optional

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from ..checkpoint.files import UNFINISHED

NAME = "run.lock"
BEAT = 10.0  # seconds between signs of life
STALE_AFTER = 60.0  # seconds without one


def lock_run(folder: str, key: str = "train.output_dir (OUTPUT_DIR)") -> None:
    """Take the folder of a run until this process ends; once more has no effect.

    A lock whose run is dead is replaced. On the same host that is one whose process is gone, or
    another one under the same number; of other hosts and containers, one without a sign of life in
    `STALE_AFTER` seconds.

    Args:
        folder: local, existing.
        key: of the config that names the folder.

    Raises:
        ValueError: another run has it.
        OSError: the lock cannot be written.
    """
    path, own = os.path.join(folder, NAME), _describe_self()
    with _one_at_a_time(folder):
        other = _read(path)
        if other == own:
            return
        if other is not None and _is_alive(other, path):
            raise ValueError(
                f"{folder!r} is in use by another run (host {other.get('host', 'unknown')}, "
                f"process {other.get('pid', 'unknown')}). Take another {key}, or end that run; if "
                f"there is none, delete {path!r}."
            )
        temporary = f"{path}.{os.getpid()}{UNFINISHED}"
        with open(temporary, "w") as file:
            json.dump(own, file)
        os.replace(temporary, path)
    beat = threading.Event()  # set at the end
    threading.Thread(target=_beat, args=(path, own, beat), daemon=True).start()
    # Unlike atexit's, it is also called in processes that multiprocessing has started.
    Finalize(None, _release, args=(path, own, beat), exitpriority=0)


def _describe_self() -> Dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pids": _pid_space(), "pid": pid, "start": _start(pid)}


def _pid_space() -> str:
    """Where process numbers are unique: containers of a host may number theirs apart."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start(pid: int) -> Optional[str]:
    """Start time of a process, in ticks since boot; None if unknown, "" if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            # The second field is a name in parentheses, which may hold blanks and parentheses.
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "" if os.path.isdir("/proc/self") else None
    return "" if state in "ZX" else fields[18]


def _read(path: str) -> Optional[Dict[str, Any]]:
    """What a lock says; {} if it is damaged, None if there is none."""
    try:
        with open(path) as file:
            content = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_alive(other: Dict[str, Any], path: str) -> bool:
    own = _describe_self()
    if all(other.get(key) == own[key] for key in ("host", "pids")):
        start = _start(other.get("pid", 0))
        if start is not None:
            return start != "" and start == other.get("start")
        with contextlib.suppress(PermissionError):
            try:
                os.kill(other["pid"], 0)
            except ProcessLookupError:
                return False
        return True
    # Both times are the file system's: clocks of hosts differ.
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".") as now:
        return os.stat(now.name).st_mtime - os.stat(path).st_mtime < STALE_AFTER


@contextlib.contextmanager
def _one_at_a_time(folder: str) -> Iterator[None]:
    """Of the processes of a host, so that two do not replace the same stale lock."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder or ".", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not offer it
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _beat(path: str, own: Dict[str, Any], end: threading.Event) -> None:
    while not end.wait(BEAT) and _read(path) == own:
        with contextlib.suppress(OSError):
            os.utime(path)


def _release(path: str, own: Dict[str, Any], end: threading.Event) -> None:
    end.set()
    if _read(path) == own:
        with contextlib.suppress(OSError):
            os.remove(path)
