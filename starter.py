"""The command line `comfyui-tasks`, and the functions behind it for callers in Python.

    from starter import start_image
    started = await start_image(client, ImageTask(task_id="cat-1", …))
    result = await started.handle.result()

`python starter.py --help` lists the commands. The pieces are in `cli/`.
"""

from __future__ import annotations

from cli.commands import app, main
from cli.demo import run_demo
from cli.doctor import examine
from cli.failures import BadInput, CannotReach, CommandFailure, ExitCode, TaskExists, UnknownTask
from cli.follow import Watcher, follow
from cli.outcome import TaskOutcome, find_task
from cli.start import Started, start_image, start_training
from cli.tasks import cancel_task, confirm_price, list_tasks, show_task

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
    "run_demo",
    "show_task",
    "start_image",
    "start_training",
]

if __name__ == "__main__":
    main()
