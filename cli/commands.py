"""Every command, registered on the one application in the order in which `--help` lists them."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from cli import doctor_command, start_commands, task_commands
from cli.app import app
from logs import configure_logs

__all__ = ["app", "doctor_command", "main", "start_commands", "task_commands"]


def main() -> NoReturn:
    """Run the command line and end the process with the command's exit code.

    Temporal's native threads may still hold a reply when the interpreter shuts down, and then abort the process:
    a script would see 134 instead of our exit code. Ending without that shutdown keeps the code.
    """
    configure_logs(level="WARNING", as_json=False)
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
            continue
    os._exit(code)
