"""Signals that stop a run after its current step: what a cluster sends before it kills a job."""

import os
import signal
import threading
from typing import Any, Dict, Optional

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Exit code of a run that was stopped and saved: "temporary failure, try again" of sysexits.h.
STOPPED = 75


class StopRequest:
    """Context in which a signal asks for a stop; a second one ends the process at once.

    In another thread than the main one, where Python allows no handlers, it does nothing. submitit
    announces a time limit or a preemption by SIGUSR2: where that has a handler, it asks for a stop
    too, and the handler, which queues the job again, is called by `exit` once the run is saved.

    Attributes:
        signal: number of the signal that came; None as long as none did.
    """

    def __init__(self) -> None:
        self.signal: Optional[int] = None
        self._before: Dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = list(STOP_SIGNALS)
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)
        for number in numbers:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._pid:
            return  # a worker of the data loader, which the current step still needs
        if self.signal is None:
            self.signal = number
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(self._pid, number)

    def exit(self) -> None:
        """Leave the process of a saved run with the code `STOPPED`.

        Raises:
            SystemExit: always, unless the handler before this one ends the process otherwise.
        """
        handler = self._before.get(self.signal)
        if callable(handler):
            handler(self.signal, None)
        raise SystemExit(STOPPED)
