"""How a process that used Temporal ends."""

from __future__ import annotations

import os
import sys
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
