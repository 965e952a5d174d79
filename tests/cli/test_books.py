"""The demo's check of the books, on both credits services: what a task reports against what the ledger shows."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from activities.credits import CreditsClient
from activities.tokens import ServiceToken
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import CreditsSummary
from doctor.books import check_books
from doctor.finding import Verdict
from proof.simulators.credits_profile import PROFILES
from proof.simulators.serving import Simulators, running_simulators
from tests.conftest import unique

WHO = {"tenant_id": "tenant-demo", "user_id": "user-demo"}
HELD = 50


class Payer:
    """Acts on the credits service past any task, and reads its ledger as the command line does."""

    def __init__(self, simulators: Simulators) -> None:
        self.simulators = simulators
        self.task_id = unique("books")
        self._token = simulators.tokens.made_for(*WHO.values())

    async def post(self, route: str, **body: object) -> str:
        """The `pre_deduct_id` of the answer, or an empty string."""
        headers = {"Authorization": f"Bearer {self._token}", "X-Idempotency-Key": unique("key")}
        async with httpx.AsyncClient(base_url=f"{self.simulators.credits_url}/api/v1/credits") as http:
            answer = await http.post(f"/{route}", json={**WHO, "task_id": self.task_id, **body}, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json().get("pre_deduct_id", ""))

    async def hold(self) -> str:
        given = {"template_id": "upscale", "scene": "image.generate", "estimated_cost": HELD, "expire_in": 600}
        return await self.post("pre-deduct", currency="point", **given)

    async def verdicts(self, charged: int) -> list[Verdict]:
        """The verdicts on the account and on a task that reports this charge."""
        call_for = CallFor(task_id="books", scene=Scene.IMAGE_GENERATE, **WHO)
        async with CreditsClient(self.simulators.credits_url, ServiceToken(self._token)) as credits:
            found = await check_books(credits, call_for, {self.task_id: CreditsSummary(charged=charged)})
        return [finding.verdict for finding in found]


@pytest_asyncio.fixture(scope="module", params=list(PROFILES))
async def simulators(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Simulators]:
    folder = tmp_path_factory.mktemp("books")
    async with running_simulators(folder, credits_profile=PROFILES[request.param]) as running:
        yield running


@pytest.mark.parametrize("cost", [38, HELD], ids=["part of the hold", "all of it"])
async def test_a_commit_is_read_as_its_cost(simulators: Simulators, cost: int) -> None:
    payer = Payer(simulators)
    hold = await payer.hold()
    await payer.post("commit", pre_deduct_id=hold, actual_cost=cost, template_id="upscale")
    assert await payer.verdicts(cost) == [Verdict.OK, Verdict.OK]
    assert await payer.verdicts(HELD + cost) == [Verdict.OK, Verdict.WRONG]


async def test_a_cancelled_hold_cost_nothing(simulators: Simulators) -> None:
    payer = Payer(simulators)
    await payer.post("cancel", pre_deduct_id=await payer.hold(), reason="the job failed")
    assert await payer.verdicts(0) == [Verdict.OK, Verdict.OK]


async def test_an_open_hold_is_seen(simulators: Simulators) -> None:
    payer = Payer(simulators)
    hold = await payer.hold()
    await payer.hold()
    await payer.post("commit", pre_deduct_id=hold, actual_cost=38, template_id="upscale")
    assert await payer.verdicts(38) == [Verdict.OK, Verdict.WRONG]
