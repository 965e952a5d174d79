"""The simulators as processes: killed at any time they lose nothing; a bad setting is a sentence."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import proof.simulators.__main__
from local_stack.ports import any_free_port
from proof.simulators.admin_client import ComfyUIAdmin, CreditsAdmin
from proof.simulators.serving import TEST_ADMIN_TOKEN, TEST_CALLBACK_SECRET, TEST_TOKEN_SECRET, running_simulators
from tests.simulators.platform import Caller, Receiver, new_task
from tests.waiting import comes_true, until

ROOT = Path(__file__).parents[2]
PREFIX = "COMFYUI_TEMPORAL_"


def _settings(folder: Path, **other: str) -> dict[str, str]:
    """Environment variables of a simulator; `other` by the settings' own names."""
    given = {
        "SIMULATOR_FOLDER": str(folder),
        "SIMULATOR_ADMIN_TOKEN": TEST_ADMIN_TOKEN,
        "SERVICE_SECRET": TEST_TOKEN_SECRET,
        "CALLBACK_SECRETS": TEST_CALLBACK_SECRET,
        **other,
    }
    return {PREFIX + name: value for name, value in given.items()}


async def _started(name: str, folder: Path, port: int, *options: str) -> asyncio.subprocess.Process:
    """A simulator's own process, answering. Its working directory holds no `.env`."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proof.simulators", name, *options),
        cwd=folder,
        env=others | {"PYTHONPATH": str(ROOT)} | _settings(folder, **{f"{name.upper()}_SIMULATOR_PORT": str(port)}),
        stderr=subprocess.DEVNULL,
    )

    async def answers() -> bool:
        assert process.returncode is None, f"the simulator ended with {process.returncode}"
        try:
            return (await http.get(f"http://127.0.0.1:{port}/health")).status_code == 200
        except httpx.TransportError:
            return False

    async with httpx.AsyncClient() as http:
        await until(answers, f"the {name} simulator", within_seconds=20)
    return process


async def _kill(process: asyncio.subprocess.Process) -> None:
    process.kill()
    await process.wait()


async def test_a_killed_comfyui_goes_on_where_it_was(tmp_path: Path, receiver: Receiver) -> None:
    port, task = any_free_port(), new_task()
    receiver.answers[task] = [503]
    process = await _started("comfyui", tmp_path, port)
    admin = ComfyUIAdmin(f"http://127.0.0.1:{port}", TEST_ADMIN_TOKEN)
    async with running_simulators(tmp_path / "unused") as ours, httpx.AsyncClient() as http:
        caller = Caller(ours, receiver, http)
        url = f"http://127.0.0.1:{port}/comfyui/v1/jobs"
        body, headers = caller.job_body(task), caller.headers(f"{task}:submit:1")
        first = (await http.post(url, json=body, headers=headers)).json()
        await admin.advance(200)
        await comes_true(lambda: len(receiver.of(task)) == 1, "the first attempt")
        await admin.fault("callback_duplicate", task_id=task, callback_status="delivery")

        await _kill(process)
        process = await _started("comfyui", tmp_path, port)
        try:
            again = (await http.post(url, json=body, headers=headers)).json()
            assert again == first, "the key is still known"
            state = (await http.get(f"{url}/{first['job_id']}", headers=caller.headers())).json()
            assert state["job_status"] == "processing"
            await admin.advance(300)
            await comes_true(lambda: receiver.statuses(task).count("delivery") == 2, "delivery and its duplicate")
            assert receiver.statuses(task).count("processing") == 5, "the one answered 503 came again"
        finally:
            await admin.close()
            await _kill(process)


async def test_killed_credits_lose_no_hold_and_expire_it_in_time(tmp_path: Path, receiver: Receiver) -> None:
    port, task = any_free_port(), new_task()
    process = await _started("credits", tmp_path, port)
    admin = CreditsAdmin(f"http://127.0.0.1:{port}", TEST_ADMIN_TOKEN)
    async with running_simulators(tmp_path / "unused") as ours, httpx.AsyncClient() as http:
        caller = Caller(ours, receiver, http)
        url = f"http://127.0.0.1:{port}/api/v1/credits/pre-deduct"
        body, headers = caller.hold_body(task, expire_in=60), caller.headers(f"{task}:hold:1")
        first = (await http.post(url, json=body, headers=headers)).json()

        await _kill(process)
        process = await _started("credits", tmp_path, port)
        try:
            assert (await http.post(url, json=body, headers=headers)).json() == first
            assert (await admin.account()).frozen == 50
            await admin.advance(61)
            assert [hold.phase for hold in await admin.holds()] == ["expired"]
            assert (await admin.balance_check()).ok
        finally:
            await admin.close()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                await process.wait()
    assert process.returncode in (0, -signal.SIGTERM), "it ends when it is stopped"


async def test_the_profile_of_credits_is_chosen_by_an_option(tmp_path: Path) -> None:
    port = any_free_port()
    process = await _started("credits", tmp_path, port, "--credits-profile", "field")
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            who = {"tenant_id": "tenant-demo", "user_id": "user-demo"}
            answer = await http.get("/api/v1/credits/ledger", params=who)
            assert set(answer.json()) == {"entries"}, "no token, no pages"
    finally:
        await _kill(process)


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        ([], {}, "Say which one"),
        (["credits"], {"SERVICE_SECRET": "short"}, "at least 32 bytes"),
        (["comfyui"], {"CALLBACK_SECRETS": ""}, "callbacks must be signed"),
        (["comfyui"], {"CALLBACK_SECRETS": "whsec_"}, "no Standard Webhooks secret"),
    ],
)
def test_a_bad_setting_is_a_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    settings: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proof.simulators.__main__, "configure_logs", lambda **_: None)
    for name, value in _settings(tmp_path, **settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        proof.simulators.__main__.main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


async def test_a_simulator_can_be_stopped_and_started_in_a_test(tmp_path: Path, receiver: Receiver) -> None:
    async with running_simulators(tmp_path) as served, httpx.AsyncClient() as http:
        caller = Caller(served, receiver, http)
        task, url = new_task(), served.credits_url
        hold = await caller.hold(task)
        await served.credits.stop()
        with pytest.raises(httpx.ConnectError):
            await caller.hold(new_task())
        await served.credits.start()
        assert served.credits_url == url
        assert (await caller.commit(task, hold["pre_deduct_id"], 50)).status_code == 200
