"""The simulated ComfyUI is held to every case; and a server that breaks the contract is found out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from pydantic import SecretStr

from comfyui_temporal.contracts.permissions import Scope
from proof.conformance import (
    Outcome,
    Person,
    Profile,
    Subject,
    Unreachable,
    Verdict,
    cases,
    opened,
    outcome_of,
    run,
)
from proof.conformance.__main__ import main
from proof.conformance.receiver import CallbackReceiver, receiving
from proof.simulators.serving import TEST_CALLBACK_SECRET, TEST_TOKEN_SECRET, Simulators, running_simulators
from runtime.settings import Settings

ME, STRANGER = Person("tenant-demo", "user-demo"), Person("tenant-other", "user-other")
SPEED = 960.0
"""A standard image takes 0.5 s, a training 3 s."""
ALL = cases()
TRAINED_EARLY = "a_training_waits_for_its_start"


@pytest_asyncio.fixture(scope="module")
async def simulators(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Simulators]:
    folder = tmp_path_factory.mktemp("simulators")
    async with running_simulators(folder, speed=SPEED, gpus={"rtx4090": 40, "a100": 20}) as running:
        yield running


@asynccontextmanager
async def held_to_account(simulators: Simulators, profile: Profile | None = None) -> AsyncIterator[Subject]:
    def token(person: Person, scopes: Collection[Scope]) -> str:
        return simulators.tokens.made_for(person.tenant_id, person.user_id, scopes)

    async with (
        receiving(CallbackReceiver(TEST_CALLBACK_SECRET)) as receiver,
        opened(simulators.comfyui_url, token, ME, STRANGER, profile, receiver) as subject,
    ):
        yield subject


@pytest_asyncio.fixture(scope="module")
async def outcomes(simulators: Simulators) -> dict[str, Outcome]:
    """Of all cases, which run side by side: one after the other they would take minutes."""
    async with held_to_account(simulators) as subject:
        return {outcome.case.name: outcome for outcome in await run(ALL, subject)}


@pytest.mark.parametrize("name", [case.name for case in ALL])
def test_the_simulator_holds(outcomes: dict[str, Outcome], name: str) -> None:
    assert outcomes[name].verdict is Verdict.HELD, outcomes[name].says


async def verdict_of(simulators: Simulators, name: str) -> Outcome:
    case = next(case for case in ALL if case.name == name)
    async with held_to_account(simulators, Profile(patience_seconds=2)) as subject:
        return await outcome_of(case, subject)


@pytest.fixture
async def faulty(simulators: Simulators) -> AsyncIterator[Simulators]:
    yield simulators
    await simulators.admin.remove_faults()


@pytest.mark.parametrize(
    ("fault", "more", "found_by", "says"),
    [
        ("ignore_keys", {}, "repeats_at_once_make_one_job", "one key made 5 jobs"),
        ("alter", {"route": "get_job", "fields": {"job_status": "queued"}}, "a_delivered_job_has_pictures", "the end"),
        ("alter", {"route": "submit_job", "fields": {"job_id": "///"}}, "a_job_is_accepted", "job_id"),
        ("alter", {"route": "submit_job", "fields": {"estimated_cost": 7}}, "prices_rise", "sd 7, hd 7"),
        ("alter", {"route": "create_training", "fields": {"training_status": "running"}}, TRAINED_EARLY, "as running"),
        ("callback_forge", {"instead": True}, "states_are_told", "not genuine"),
        ("callback_duplicate", {"same_id": False}, "states_are_told", "share a sequence"),
        ("callback_withhold", {}, "a_callback_is_repeated", "did not come"),
        ("error", {"route": "get_job", "status": 500}, "an_unknown_job_is_told", "got 500"),
        ("html", {"route": "list_gpus", "status": 200}, "gpus_are_listed", "no JSON"),
    ],
)
async def test_a_server_that_breaks_the_contract_is_detected(
    faulty: Simulators, fault: str, more: dict[str, Any], found_by: str, says: str
) -> None:
    await faulty.admin.comfyui.fault(fault, times=None, **more)
    outcome = await verdict_of(faulty, found_by)
    assert outcome.verdict is Verdict.BROKEN
    assert says in outcome.says


async def test_a_route_that_may_be_missing_is_not_offered(faulty: Simulators) -> None:
    await faulty.admin.comfyui.fault("not_offered", times=None)
    for name in ("gpus_are_listed", "an_unknown_job_is_not_cancelled", "a_cancelled_job_ends"):
        assert (await verdict_of(faulty, name)).verdict is Verdict.NOT_OFFERED


async def test_no_case_is_judged_where_the_service_is_unreachable(unused_tcp_port: int) -> None:
    address = f"http://127.0.0.1:{unused_tcp_port}"
    async with opened(address, lambda person, scopes: "token", ME) as subject:
        with pytest.raises(Unreachable, match=address):
            await run(cases(changes_nothing=True), subject)


async def test_no_case_is_judged_where_the_token_is_rejected(simulators: Simulators) -> None:
    async with opened(simulators.comfyui_url, lambda person, scopes: "token", ME) as subject:
        with pytest.raises(Unreachable, match="token"):
            await run(cases(changes_nothing=True), subject)
        # The client is closed next: no case may go on with it.
        assert not [task for task in asyncio.all_tasks() if "run.<locals>.one" in repr(task.get_coro())]


@pytest.mark.parametrize(("fault", "code", "said"), [(None, 0, "ok    prices_rise"), ("alter", 1, "WRONG prices_rise")])
async def test_the_command_says_what_is_broken(
    faulty: Simulators, capsys: pytest.CaptureFixture[str], fault: str | None, code: int, said: str
) -> None:
    if fault:
        await faulty.admin.comfyui.fault(fault, times=None, route="submit_job", fields={"estimated_cost": 7})
    settings = Settings(
        _env_file=None, service_secret=SecretStr(TEST_TOKEN_SECRET), callback_secrets=TEST_CALLBACK_SECRET
    )
    arguments = ["--url", faulty.comfyui_url, "--only", "prices_rise", "--only", "states_are_told"]
    # It has an event loop of its own, as when it is run.
    assert await asyncio.to_thread(main, arguments, settings) == code
    out = capsys.readouterr().out
    assert said in out
    assert "ok    states_are_told" in out


async def test_cases_that_change_nothing_leave_nothing(simulators: Simulators) -> None:
    before = await simulators.admin.comfyui.jobs()
    async with held_to_account(simulators) as subject:
        outcomes = await run(cases(changes_nothing=True), subject)
    assert {outcome.verdict for outcome in outcomes} == {Verdict.HELD}
    assert len(await simulators.admin.comfyui.jobs()) == len(before)
