"""The command line `comfyui-tasks`. It needs the extra `cli`: `pip install 'comfyui-temporal[cli]'`."""

from __future__ import annotations

from importlib import import_module


def main() -> None:
    """Run the command line and end the process with the command's exit code."""
    try:
        commands = import_module("comfyui_temporal.command_line.commands")
    except ModuleNotFoundError as missing:
        raise SystemExit(
            f"The command line needs {missing.name}: install the extra, pip install 'comfyui-temporal[cli]'."
        ) from None
    commands.main()
