"""Signals that stop a run after its current step: what a cluster sends before it kills a job."""

import os
import signal
import threading
import time
from typing import Any, Dict, Optional

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Exit code of a run that was stopped and saved: "temporary failure, try again" of sysexits.h.
STOPPED = 75
# Seconds in which more signals are the same request: what starts processes hands on a signal that
# the system may have sent to each of them as well.
SAME_SIGNAL = 2.0


class StopRequest:
    """Context in which a signal asks for a stop; a later second one ends the process at once.

    In another thread than the main one, where Python allows no handlers, it does nothing. In a job
    of submitit, which announces a time limit or a preemption by SIGUSR2 and passes over SIGTERM,
    that handler, which queues the job again, is called by `exit` once the run is saved.

    Attributes:
        signal: number of the signal that came; None as long as none did.
    """

    def __init__(self) -> None:
        self.signal: Optional[int] = None
        self._time = 0.0
        self._before: Dict[int, Any] = {}
        self._queue_again: Any = None
        self._pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._queue_again = signal.getsignal(signal.SIGUSR2)
        is_queued = callable(self._queue_again)
        for number in (signal.SIGUSR1, signal.SIGUSR2) if is_queued else STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a worker of the data loader, which the current step still needs
        if self.signal is None:
            self.signal, self._time = number, time.monotonic()
        elif time.monotonic() - self._time > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._pid, number)

    def exit(self) -> None:
        """Leave the process of a saved run with the code `STOPPED`; all processes call it.

        In a job of submitit its handler ends the main process. The others end without an error,
        which would end the main one too early.

        Raises:
            SystemExit: always, unless the handler ends the process otherwise.
        """
        if callable(self._queue_again):
            self._queue_again(signal.SIGUSR2, None)
            raise SystemExit(0)
        raise SystemExit(STOPPED)
