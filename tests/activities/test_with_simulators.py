"""The clients against running services: the ordinary path of every call, and the faults that a repeat must tolerate."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.outside_http import OutsideFailure
from activities.tokens import SignedTokens
from comfyui_temporal.contracts.calls import JobCall, LedgerQuery, Post
from comfyui_temporal.contracts.comfyui import (
    DatasetFile,
    DatasetSnapshot,
    JobRequest,
    JobStatus,
    TrainingRequest,
    TrainingStatus,
)
from comfyui_temporal.contracts.credits import ChargeRequest, EstimateRequest, LedgerKind
from comfyui_temporal.contracts.errors import Answer, FailureCode
from comfyui_temporal.contracts.permissions import Scene
from proof.simulators.serving import DEFAULT_AUDIENCE, DEFAULT_ISSUER, TEST_TOKEN_SECRET, Simulators, running_simulators
from tests.activities.calls import (
    call_for,
    cancel_hold_post,
    charge_post,
    commit_post,
    estimate_post,
    job_post,
    pre_deduct_post,
    training_post,
)
from tests.conftest import unique

TOKENS = SignedTokens(TEST_TOKEN_SECRET, DEFAULT_ISSUER, DEFAULT_AUDIENCE)


@dataclass(frozen=True)
class Platform:
    simulators: Simulators
    comfyui: ComfyUIClient
    credits: CreditsClient


@pytest_asyncio.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Platform]:
    async with (
        running_simulators(tmp_path_factory.mktemp("simulators"), speed=1.0) as simulators,
        ComfyUIClient(simulators.comfyui_url, TOKENS, read_seconds=1.0) as comfyui,
        CreditsClient(simulators.credits_url, TOKENS, read_seconds=1.0) as credits_client,
    ):
        yield Platform(simulators, comfyui, credits_client)


@pytest_asyncio.fixture
async def platform(shared: Platform) -> AsyncIterator[Platform]:
    yield shared
    await shared.simulators.admin.remove_faults()
    check = await shared.simulators.admin.credits.balance_check()
    assert check.ok, check.problems


def reply_of(answer: Answer[Any]) -> Any:
    assert answer.refusal is None, answer.refusal
    assert answer.reply is not None
    return answer.reply


CALLBACKS = "http://127.0.0.1:1/callbacks/comfyui/"


def new_job(task_id: str) -> Post[JobRequest]:
    body = job_post().body.model_copy(update={"task_id": task_id, "callback_url": CALLBACKS + task_id})
    return Post(call_for=call_for(task_id=task_id), key=f"{task_id}:submit:1", body=body)


def new_training(task_id: str) -> Post[TrainingRequest]:
    dataset = DatasetSnapshot(
        dataset_id="cats",
        snapshot_uri=f"s3://temporary/snapshots/{task_id}/cats/files/",
        files=[DatasetFile(path="1.png", size_bytes=3, sha256="0" * 64)],
    )
    named = {"task_id": task_id, "dataset": dataset, "callback_url": CALLBACKS + task_id}
    body = training_post().body.model_copy(update=named)
    return Post(call_for=call_for(scene=Scene.MODEL_TRAIN, task_id=task_id), key=f"{task_id}:submit:1", body=body)


def about(post: Post[Any], job_id: str, key: str | None = None) -> JobCall:
    return JobCall(call_for=post.call_for, job_id=job_id, key=key)


async def test_a_job_is_submitted_read_and_cancelled(platform: Platform) -> None:
    post = new_job(unique("job"))
    job = reply_of(await platform.comfyui.submit_job(post))
    assert (job.job_status, job.estimated_cost) == (JobStatus.QUEUED, 24)
    assert job.estimated_time > 0
    state = reply_of(await platform.comfyui.get_job(about(post, job.job_id)))
    assert (state.job_id, state.has_ended()) == (job.job_id, False)
    cancelled = reply_of(await platform.comfyui.cancel_job(about(post, job.job_id, f"{post.key}:cancel")))
    assert cancelled.job_id == job.job_id
    state = reply_of(await platform.comfyui.get_job(about(post, job.job_id)))
    assert state.error_details.code == "cancelled"
    [run] = await platform.simulators.admin.comfyui.jobs(post.call_for.task_id)
    assert run.is_over


async def test_a_training_is_created_started_read_and_cancelled(platform: Platform) -> None:
    post = new_training(unique("training"))
    training = reply_of(await platform.comfyui.create_training(post))
    assert training.training_status is TrainingStatus.QUEUED
    assert training.gpu_hours > 0
    started = await platform.comfyui.start_training(about(post, training.training_id, f"{post.key}:start"))
    assert reply_of(started).training_id == training.training_id
    state = reply_of(await platform.comfyui.get_training(about(post, training.training_id)))
    assert not state.has_ended()
    cancel = about(post, training.training_id, f"{post.key}:cancel")
    assert reply_of(await platform.comfyui.cancel_training(cancel)).training_id == training.training_id
    state = reply_of(await platform.comfyui.get_training(about(post, training.training_id)))
    assert state.failure().code == "cancelled"


async def test_gpus_are_listed(platform: Platform) -> None:
    pools = reply_of(await platform.comfyui.list_gpus(call_for(scene=Scene.MODEL_TRAIN)))
    assert pools
    assert all(pool.total >= pool.available >= 0 for pool in pools)


async def test_an_unknown_job_is_a_refusal(platform: Platform) -> None:
    post = new_job(unique("job"))
    answer = await platform.comfyui.get_job(about(post, "unknown-job"))
    assert answer.refusal is not None
    assert (answer.refusal.message, answer.refusal.code) == ("job_not_found", FailureCode.LOST)


async def test_bad_payloads_are_refused_field_by_field(platform: Platform) -> None:
    post = new_job(unique("job"))
    spoilt: Post[JobRequest] = Post(
        call_for=post.call_for, key=post.key, body=post.body.model_copy(update={"template_id": "no-such-template"})
    )
    answer = await platform.comfyui.submit_job(spoilt)
    assert answer.refusal is not None
    assert (answer.refusal.message, answer.refusal.code) == ("template_not_found", FailureCode.INPUT_INVALID)


async def test_a_hold_is_taken_and_committed(platform: Platform) -> None:
    task_id = unique("hold")
    before = await platform.simulators.admin.credits.account()
    hold = reply_of(await platform.credits.pre_deduct(pre_deduct_post(task_id=task_id, key=f"{task_id}:pre-deduct:1")))
    assert hold.frozen_amount == 24
    assert hold.expire_at is not None
    done = reply_of(await platform.credits.commit(commit_post(hold.pre_deduct_id, cost=20, task_id=task_id)))
    assert done.frozen_amount == 20
    after = await platform.simulators.admin.credits.account()
    assert before.balance - after.balance == 20
    again = await platform.credits.cancel_hold(cancel_hold_post(hold.pre_deduct_id, task_id=task_id))
    assert again.refusal is not None
    assert again.refusal.message == "pre_deduct_already_processed"
    ledger = reply_of(await platform.credits.ledger(LedgerQuery(call_for=call_for(), task_id=task_id)))
    assert {entry.kind for entry in ledger.entries} == {LedgerKind.PRE_DEDUCT, LedgerKind.COMMIT}


async def test_a_hold_is_given_back(platform: Platform) -> None:
    task_id = unique("hold")
    hold = reply_of(await platform.credits.pre_deduct(pre_deduct_post(task_id=task_id, key=f"{task_id}:pre-deduct:1")))
    cancelled = reply_of(await platform.credits.cancel_hold(cancel_hold_post(hold.pre_deduct_id, task_id=task_id)))
    assert isinstance(cancelled.balance_after, int), "it comes as a string (field)"
    assert await platform.simulators.admin.credits.charged(task_id) == 0


async def test_estimate_charge_and_balance(platform: Platform) -> None:
    estimate = reply_of(await platform.credits.estimate(estimate_post()))
    assert estimate.selected_cost == 24
    assert {option.priority for option in estimate.options} == {"standard", "accelerated"}
    task_id = unique("charge")
    body: ChargeRequest = charge_post().body.model_copy(update={"task_id": task_id})
    charged = reply_of(await platform.credits.charge(Post(call_for=call_for(), key=f"{task_id}:charge:1", body=body)))
    assert charged.change == -24
    balance = reply_of(await platform.credits.balance(call_for()))
    assert balance.balance == (await platform.simulators.admin.credits.account()).balance


async def test_a_price_for_an_unknown_base_model_is_refused(platform: Platform) -> None:
    body: EstimateRequest = estimate_post().body.model_copy(update={"resolution": "no-such-resolution"})
    answer = await platform.credits.estimate(Post(call_for=call_for(), key="k:estimate:1", body=body))
    assert answer.refusal is not None
    assert answer.refusal.code is FailureCode.INPUT_INVALID


async def test_too_little_balance_is_a_refusal(platform: Platform) -> None:
    answer = await platform.credits.pre_deduct(pre_deduct_post(cost=10_000_000, key=unique("k") + ":pre-deduct:1"))
    assert answer.refusal is not None
    assert answer.refusal.code is FailureCode.INSUFFICIENT_BALANCE


async def test_a_lost_answer_is_learnt_by_the_same_key_and_body(platform: Platform) -> None:
    task_id = unique("lost")
    await platform.simulators.admin.credits.fault("drop", route="pre_deduct", task_id=task_id)
    post = pre_deduct_post(task_id=task_id, key=f"{task_id}:pre-deduct:1")
    with pytest.raises(OutsideFailure) as raised:
        await platform.credits.pre_deduct(post)
    assert raised.value.code is FailureCode.CREDITS_UNAVAILABLE
    hold = reply_of(await platform.credits.pre_deduct(post))
    assert [seen.pre_deduct_id for seen in await platform.simulators.admin.credits.holds(task_id)] == [
        hold.pre_deduct_id
    ]


async def test_another_body_under_the_same_key_is_a_conflict(platform: Platform) -> None:
    key = unique("k") + ":pre-deduct:1"
    reply_of(await platform.credits.pre_deduct(pre_deduct_post(key=key)))
    answer = await platform.credits.pre_deduct(pre_deduct_post(cost=25, key=key))
    assert answer.refusal is not None
    assert (answer.refusal.message, answer.refusal.code) == ("idempotency_conflict", FailureCode.TASK_CONFLICT)


@pytest.mark.parametrize(
    ("kind", "parameters", "code"),
    [
        ("error", {"status": 503}, FailureCode.COMFYUI_UNAVAILABLE),
        ("rate_limit", {}, FailureCode.COMFYUI_UNAVAILABLE),
        ("html", {}, None),
        ("garbage", {}, FailureCode.REPLY_INVALID),
        ("drop", {"when": "before"}, FailureCode.COMFYUI_UNAVAILABLE),
        ("delay", {"seconds": 1.3}, FailureCode.COMFYUI_UNAVAILABLE),
    ],
)
async def test_each_fault_of_the_switchboard_is_a_retried_failure_and_the_repeat_is_the_same_job(
    platform: Platform, kind: str, parameters: dict[str, Any], code: FailureCode | None
) -> None:
    post = new_job(unique(f"fault-{kind.replace('_', '-')}"))
    await platform.simulators.admin.comfyui.fault(kind, route="submit_job", **parameters)
    with pytest.raises(OutsideFailure) as raised:
        await platform.comfyui.submit_job(post)
    assert raised.value.may_be_retried
    assert code is None or raised.value.code is code
    job = reply_of(await platform.comfyui.submit_job(post))
    assert [run.run_id for run in await platform.simulators.admin.comfyui.jobs(post.call_for.task_id)] == [job.job_id]


async def test_a_service_without_our_routes_is_seen_as_such(platform: Platform) -> None:
    await platform.simulators.admin.comfyui.fault("not_offered")
    post = new_job(unique("job"))
    job = reply_of(await platform.comfyui.submit_job(post))
    assert (await platform.comfyui.cancel_job(about(post, job.job_id, f"{post.key}:cancel"))).not_offered
    assert (await platform.comfyui.list_gpus(post.call_for)).not_offered


async def test_a_rejected_token_is_reported_as_such(platform: Platform) -> None:
    forged = SignedTokens("another-secret-of-at-least-32-bytes", DEFAULT_ISSUER, DEFAULT_AUDIENCE)
    async with CreditsClient(platform.simulators.credits_url, forged) as client:
        with pytest.raises(OutsideFailure, match="token was not accepted"):
            await client.balance(call_for())


async def test_a_plain_ledger_is_narrowed_to_the_task(platform: Platform) -> None:
    """A service that ignores `task_id` and tells no kinds (field)."""
    task_id = unique("plain")
    for number in range(3):
        key = unique("other") + ":pre-deduct:1"
        reply_of(await platform.credits.pre_deduct(pre_deduct_post(task_id=f"{task_id}-{number}", key=key)))
    reply_of(await platform.credits.pre_deduct(pre_deduct_post(task_id=task_id, key=f"{task_id}:pre-deduct:1")))
    await platform.simulators.admin.credits.fault("plain_ledger")
    ledger = reply_of(await platform.credits.ledger(LedgerQuery(call_for=call_for(), task_id=task_id, limit=2)))
    assert [entry.change for entry in ledger.entries] == [-24]
    assert ledger.cursor is None
