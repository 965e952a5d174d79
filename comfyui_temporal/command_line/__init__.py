"""The command line `comfyui-tasks`. It needs the extra `cli`: `pip install 'comfyui-temporal[cli]'`."""

from __future__ import annotations

from importlib import import_module
from typing import Final

INTERRUPTED: Final = 130
"""The exit code after Ctrl-C, also while the commands are loaded."""


def main() -> None:
    """Run the command line and end the process with the command's exit code."""
    try:
        commands = import_module("comfyui_temporal.command_line.commands")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"The command line needs {missing.name}: install the extra, pip install 'comfyui-temporal[cli]'."
        ) from None
    commands.main()
