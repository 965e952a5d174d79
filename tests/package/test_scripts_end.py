"""A script of somebody's own that ends with its last call of Temporal ends well."""

from __future__ import annotations

import asyncio
import os
import sys

from comfyui_temporal import ImageTask, TemporalTasks
from comfyui_temporal.process_end import LAST_REPLY_SECONDS
from local_stack.folder import PROJECT
from tests.workflows.platform import Platform

SCRIPT = """
import asyncio, sys
from temporalio.client import Client
from comfyui_temporal import TemporalTasks

async def main():
    tasks = TemporalTasks(await Client.connect(sys.argv[1]))
    print((await tasks.wait(sys.argv[2])).status.value)

asyncio.run(main())
"""
SCRIPTS = 16
"""Without the pause about every third one was aborted."""


async def test_scripts_that_end_with_a_call_are_not_aborted(whole: Platform) -> None:
    task = ImageTask.model_validate(whole.image())
    tasks = TemporalTasks(whole.client, task_queue=whole.task_queue)
    await tasks.start(task)
    await tasks.wait(task.task_id)
    address = whole.client.service_client.config.target_host
    room = asyncio.Semaphore(4)

    async def run() -> tuple[int | None, str]:
        async with room:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SCRIPT, address, task.task_id),
                env={**os.environ, "PYTHONPATH": str(PROJECT)},
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await process.communicate()
        return process.returncode, output.decode().strip()

    assert await asyncio.gather(*(run() for _ in range(SCRIPTS))) == [(0, "completed")] * SCRIPTS
    assert LAST_REPLY_SECONDS < 0.1, "nobody notices it"
