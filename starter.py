"""The command line `comfyui-tasks`, and the functions behind it for callers in Python.

    from starter import start_image
    started = await start_image(client, ImageTask(task_id="cat-1", …))
    result = await started.handle.result()

`python starter.py --help` lists the commands. The pieces are in `comfyui_temporal/command_line/`.
"""

from __future__ import annotations

from comfyui_temporal.command_line.commands import app, main
from comfyui_temporal.command_line.failures import (
    BadInput,
    CannotReach,
    CommandFailure,
    ExitCode,
    TaskExists,
    UnknownTask,
)
from comfyui_temporal.command_line.follow import Watcher, follow
from comfyui_temporal.command_line.outcome import TaskOutcome, find_task
from comfyui_temporal.command_line.start import Started, start_image, start_training
from comfyui_temporal.command_line.tasks import cancel_task, confirm_price, list_tasks, show_task
from doctor.checks_of_set_up import examine

__all__ = [
    "BadInput",
    "CannotReach",
    "CommandFailure",
    "ExitCode",
    "Started",
    "TaskExists",
    "TaskOutcome",
    "UnknownTask",
    "Watcher",
    "app",
    "cancel_task",
    "confirm_price",
    "examine",
    "find_task",
    "follow",
    "list_tasks",
    "main",
    "show_task",
    "start_image",
    "start_training",
]

if __name__ == "__main__":
    main()
