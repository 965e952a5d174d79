"""Memory per open task and per open stream, from two other measurements."""

from __future__ import annotations

import asyncio
import re
import sys

from pydantic import BaseModel

from local_stack.folder import PROJECT


class Memory(BaseModel):
    """KiB, resident."""

    open_tasks: int
    per_open_task: float
    per_open_bare_workflow: float
    open_streams: int
    per_open_stream: float


async def measure(tasks: int, streams: int) -> Memory:
    """Each in a process of its own, so that nothing else counts."""
    said = await _said("proof.benchmarks.open_task_memory", "--tasks", str(tasks))
    opened = re.search(r"image task ([\d.]+), bare workflow ([\d.]+)", said)
    said = await _said("proof.benchmarks.stream_memory", "--streams", str(streams))
    streamed = re.search(r"gateway .* ([\d.]+) KiB a stream", said)
    if opened is None or streamed is None:
        raise ValueError(f"the measurements of memory said nothing of use: {said[-500:]}")
    return Memory(
        open_tasks=tasks,
        per_open_task=float(opened[1]),
        per_open_bare_workflow=float(opened[2]),
        open_streams=streams,
        per_open_stream=float(streamed[1]),
    )


async def _said(module: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments), cwd=PROJECT, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return said.decode()
