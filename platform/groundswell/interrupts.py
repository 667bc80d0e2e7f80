"""Ctrl-C as an event that work looks at, so that it can end in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rich.console import Console


@contextlib.contextmanager
def interruptible(interrupted: threading.Event, console: Console, message: str) -> Iterator[None]:
    """First Ctrl-C (or SIGTERM): the event, and the message. Second: KeyboardInterrupt, to leave at once."""

    def handler(number: int, frame: Any) -> None:
        signal.alarm(0)  # Ray's native handler of SIGTERM sets one, which ends the process three seconds later
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        console.print(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
