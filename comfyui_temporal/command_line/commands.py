"""Every command, registered on the one application in the order in which `--help` lists them."""

from __future__ import annotations

from typing import NoReturn

from comfyui_temporal.command_line import start_commands, task_commands
from comfyui_temporal.command_line.app import app
from doctor import command as doctor_command
from runtime.logs import configure_logs
from runtime.process_end import end_process

__all__ = ["app", "doctor_command", "main", "start_commands", "task_commands"]


def main() -> NoReturn:
    """Run the command line and end the process with the command's exit code."""
    configure_logs(level="WARNING", as_json=False)
    code = 0
    try:
        app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    end_process(code)
