"""How a process that used Temporal ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


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
