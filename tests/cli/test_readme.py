"""The README's shell example runs unchanged against a real server. The Python ones: tests/package/test_wheel.py."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

from temporalio.worker import Worker

from comfyui_temporal.command_line.connection import Connection
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from tests.cli.conftest import ScriptedImage
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
    assert process.returncode == 0, out.decode()
    return out.decode()


async def test_the_shell_example_does_what_it_shows(opened: Connection) -> None:
    async with Worker(opened.client, task_queue=TASK_QUEUE, workflows=[ScriptedImage]):
        from_shell = await run("sh", "-euc", example("sh"), opened=opened)
        assert '"status":"completed"' in from_shell.replace(" ", "")
