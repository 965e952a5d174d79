"""One part's process: restarted when it dies, said when it does not start, gone when its supervisor is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from local_stack.child import Child, Part
from local_stack.folder import StackFailure
from tests.waiting import comes_true, eventually

FOREVER = "import time; print('up', flush=True); time.sleep(60)"


async def at_once() -> bool:
    return True


async def never() -> bool:
    return False


def child_of(tmp_path: Path, code: str, said: list[str] | None = None, **given: object) -> Child:
    part = Part(**{"name": "part", "command": [sys.executable, "-c", code], "is_ready": at_once, **given})  # type: ignore[arg-type]
    return Child(part, folder=tmp_path, log=tmp_path / "part.log", report=(said if said is not None else []).append)


@asynccontextmanager
async def watched(child: Child) -> AsyncIterator[list[int]]:
    """The child, watched; each process id it had."""
    await child.start()
    pids: list[int] = []

    def note() -> None:
        record = child.record
        assert record is not None
        pids.append(record.pid)

    note()
    watching = asyncio.create_task(child.watch(note))
    try:
        yield pids
    finally:
        watching.cancel()
        await child.stop()


async def test_a_killed_part_is_restarted_and_the_restart_is_reported(tmp_path: Path) -> None:
    said: list[str] = []
    child = child_of(tmp_path, FOREVER, said)
    async with watched(child) as pids:
        os.kill(pids[0], signal.SIGKILL)
        await comes_true(lambda: len(pids) == 2)
        assert child.record is not None
        assert child.record.restarts == 1
    assert pids[0] != pids[1]
    assert len(said) == 1
    assert "part was ended by SIGKILL and is restarted in 0.2 s" in said[0]
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def test_a_part_that_keeps_dying_is_started_after_longer_and_longer_pauses(tmp_path: Path) -> None:
    said: list[str] = []
    async with watched(child_of(tmp_path, "raise SystemExit('no disk')", said)) as pids:
        await comes_true(lambda: len(pids) == 4)
    pauses = [line.split(" s. ")[0].split()[-1] for line in said[:3]]
    assert pauses == ["0.2", "0.4", "0.8"]
    assert "no disk" in said[0]


async def test_a_part_that_dies_while_starting_shows_the_end_of_its_log(tmp_path: Path) -> None:
    child = child_of(tmp_path, "raise SystemExit('the port is taken')", is_ready=never)
    await child.start()
    with pytest.raises(StackFailure, match=r"(?s)part ended with exit code 1 while it started.*the port is taken"):
        await child.ready()


async def test_a_part_that_hangs_while_starting_is_given_up(tmp_path: Path) -> None:
    child = child_of(tmp_path, FOREVER, is_ready=never, ready_within_seconds=0.3)
    await child.start()
    with pytest.raises(StackFailure, match=r"was not ready within"):
        await child.ready()
    await child.stop()


async def test_a_part_is_not_ready_because_another_process_answers_at_its_port(tmp_path: Path) -> None:
    """Another stack's server there would take this stack's workers, and its tasks theirs."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        child = child_of(tmp_path, FOREVER, port=other.getsockname()[1], ready_within_seconds=0.5)
        await child.start()
        try:
            with pytest.raises(StackFailure, match="was not ready"):
                await child.ready()
        finally:
            await child.stop()


async def test_a_part_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    said: list[str] = []
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)\n"
    child = child_of(tmp_path, stubborn + "time.sleep(60)", said, stop_within_seconds=0.3)
    await child.start()
    await comes_true(lambda: "up" in child.tail())
    began = time.monotonic()
    await child.stop()
    assert time.monotonic() - began < 3
    assert child.record is None
    assert "was killed" in said[0]


async def test_a_missing_program_is_reported(tmp_path: Path) -> None:
    child = child_of(tmp_path, "", command=[str(tmp_path / "nothing")])
    with pytest.raises(StackFailure, match=r"part could not be started: .*make setup"):
        await child.start()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start ends what was left")
def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib, sys
from local_stack.child import Child, Part
async def at_once(): return True
async def main():
    part = Part(name='part', command=[sys.executable, '-c', {FOREVER!r}], is_ready=at_once)
    child = Child(part, folder=pathlib.Path('.'), log=pathlib.Path(sys.argv[1]) / 'log', report=print)
    await child.start()
    print(child.record.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        orphan = int(supervisor.stdout.readline())
        assert psutil.pid_exists(orphan)
        supervisor.kill()
    eventually(lambda: not psutil.pid_exists(orphan), within_seconds=5)
