"""The command line `comfyui-tasks` of a checkout: that of the package, and `doctor`, which needs services and store.

`python starter.py --help` lists the commands. They are in `comfyui_temporal/command_line/` and `doctor/command.py`.
From Python: `from comfyui_temporal import TemporalTasks, HttpTasks, SyncTasks` (README.md).
"""

from __future__ import annotations

from pathlib import Path

# Loading takes a second or more: Ctrl-C ends that as it ends a command, without a traceback.
try:
    from comfyui_temporal.command_line.app import app, checks_before_start
    from comfyui_temporal.command_line.commands import main
    from comfyui_temporal.command_line.server import also_look_for_stack_in
    from doctor import command as doctor_command
    from doctor.task_store import refuse_strange_store
    from runtime.logs import configure_logs
except KeyboardInterrupt:
    raise SystemExit(130) from None

__all__ = ["app", "doctor_command", "main"]

also_look_for_stack_in(Path(__file__).parent)
checks_before_start.append(refuse_strange_store)

if __name__ == "__main__":
    configure_logs(level="WARNING", as_json=False)
    main()
