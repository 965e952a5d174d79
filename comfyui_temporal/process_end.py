"""How a process that used Temporal ends."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Final, NoReturn

LAST_REPLY_SECONDS: Final = 0.05


@cache
def wait_for_last_reply_at_exit() -> None:
    """For processes of others, which end as Python does: wait a moment before the interpreter shuts down.

    A native thread that has just handed over a reply still needs the interpreter to leave it. A script whose last step
    was a call of Temporal was aborted every third time, after it had done everything (exit code 134 or 139).
    """
    atexit.register(time.sleep, LAST_REPLY_SECONDS)


def end_process(code: int) -> NoReturn:
    """End with this exit code, without the interpreter's own shutdown.

    Temporal's native threads may still hold a reply at that point and abort the process (temporalio/sdk-python issue
    300). The exit code would then be 134.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader, e.g. `head`, has stopped reading
            continue
    os._exit(code)


def run_and_end(command: Callable[[], object]) -> NoReturn:
    """Run a command line, then end the process with the exit code that it raises as SystemExit."""
    code = 0
    try:
        command()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    end_process(code)
