"""The README's examples are run as they stand, against a real server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

from temporalio.worker import Worker

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from tests.cli.conftest import StandInImage
from tests.conftest import temporal_binary

PROJECT = Path(__file__).parents[2]


def example(language: str) -> str:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"<!-- example: {language} -->\n```\w+\n(.*?)```", readme, re.DOTALL)
    return str(found)


async def run(program: str, *arguments: str, opened: Connection) -> str:
    address = {
        "TEMPORAL_ADDRESS": opened.server.address,
        "PATH": f"{Path(temporal_binary()).parent}{os.pathsep}{os.environ['PATH']}",
    }
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=PROJECT,
        env={**os.environ, **address},
    )
    out, _ = await asyncio.wait_for(process.communicate(), timeout=30)
    # An example that ends as a script does: temporalio/sdk-python issue 300 may abort it in the interpreter's shutdown.
    is_aborted = process.returncode == -signal.SIGABRT and b"Python runtime state: finalizing" in out
    assert process.returncode == 0 or is_aborted, out.decode()
    return out.decode()


async def test_the_examples_do_what_they_show(opened: Connection) -> None:
    async with Worker(opened.client, task_queue=TASK_QUEUE, workflows=[StandInImage]):
        from_python = await run(sys.executable, "-c", example("python"), opened=opened)
        assert from_python.split()[0] == "completed"
        from_shell = await run("sh", "-euc", example("sh"), opened=opened)
        assert '"status":"completed"' in from_shell.replace(" ", "")
