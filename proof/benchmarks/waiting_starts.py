"""From an order to its answer that credits are held (`Prefer: wait`), one at a time and eight at once.

    python -m proof.benchmarks.waiting_starts [--probes 40]

On a whole stack, each part a process of its own. Aim: p50 ≤ 80 ms one at a time. Eight at once are compared with the
processor's limit: the processor time of all processes for one start, over the number of processors.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import Any, Final

from pydantic import BaseModel

from proof.benchmarks.burst import opened_stack
from proof.benchmarks.spread import Spread
from proof.benchmarks.whole_stack import TENANT
from proof.site.parts import OwnStack
from proof.site.site import Site
from runtime.logs import configure_logs

AT_ONCE: Final = 8
WARM_UP: Final = 5
WAIT: Final = {"Prefer": "wait=30"}


class WaitingStarts(BaseModel):
    """Seconds from the order to the answer 200."""

    one_at_a_time: Spread
    at_once: Spread
    processor_ms_each: dict[str, float]
    """Part → its processor time for one start of those at once, with its job beside it."""
    limit_ms: float
    """What eight starts take at least on these processors."""


async def measure(probes: int) -> WaitingStarts:
    """Start a stack, measure, end it. Raises StackFailure."""
    async with opened_stack() as (stack, site):
        await site.admin.comfyui.set_gpus("rtx4090", 1_000)
        await site.admin.comfyui.fault("job_stall", at=0.1, times=None)
        await site.admin.comfyui.fault("callback_withhold", times=None)
        return await _measured(stack, site, probes)


async def _measured(stack: OwnStack, site: Site, probes: int) -> WaitingStarts:
    for n in range(WARM_UP):
        await _started(site, f"warm-{n}")
    alone = [await _started(site, f"alone-{n}") for n in range(probes)]
    before, crowd = stack.processor_seconds(), list[float]()
    for turn in range(max(1, probes // AT_ONCE)):
        crowd += await asyncio.gather(*(_started(site, f"crowd-{turn}-{n}") for n in range(AT_ONCE)))
    spent = stack.processor_seconds()
    each = {part: 1000 * (spent[part] - before.get(part, 0.0)) / len(crowd) for part in spent}
    limit = AT_ONCE * sum(each.values()) / (os.cpu_count() or 1)
    return WaitingStarts(
        one_at_a_time=Spread.of(alone), at_once=Spread.of(crowd), processor_ms_each=each, limit_ms=limit
    )


async def _started(site: Site, task_id: str) -> float:
    order: dict[str, Any] = {"task_id": task_id, "template_id": "text-to-image", "prompt": "a lighthouse at dusk"}
    began = time.monotonic()
    answer = await site.gateway.post("/api/v1/tasks/images", json=order, headers=site.bearer(TENANT) | WAIT)
    took = time.monotonic() - began
    assert answer.status_code == 200 and answer.json()["credits"]["held"], answer.text
    return took


async def main(probes: int) -> None:
    configure_logs(level="ERROR")
    load = os.getloadavg()[0]
    starts = await measure(probes)
    for name, spread in (("one at a time", starts.one_at_a_time), (f"{AT_ONCE} at once", starts.at_once)):
        print(f"{name}: p50 {1000 * spread.p50:.0f} ms, p95 {1000 * spread.p95:.0f} ms ({spread.samples} times)")
    print("processor ms a start: " + ", ".join(f"{part} {ms:.1f}" for part, ms in starts.processor_ms_each.items()))
    print(
        f"limit of {AT_ONCE} at once on {os.cpu_count()} processors: {starts.limit_ms:.0f} ms; load before {load:.1f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probes", type=int, default=40)
    asyncio.run(main(parser.parse_args().probes))
