"""Every command of the package, registered on the one application in the order in which `--help` lists them."""

from __future__ import annotations

import logging
from functools import partial
from typing import NoReturn

from comfyui_temporal.command_line import new_task_commands, task_commands
from comfyui_temporal.command_line.app import PROGRAM, app
from comfyui_temporal.process_end import run_and_end

__all__ = ["app", "main", "new_task_commands", "task_commands"]


def main() -> NoReturn:
    """Run the command line and end the process with the command's exit code."""
    if not logging.getLogger().handlers:
        logging.basicConfig(level=logging.WARNING)
    run_and_end(partial(app, prog_name=PROGRAM))
