"""An image's price: compared before it is held, and what is charged for its delivery (contract §5). In points."""

from __future__ import annotations

from typing import Any

from comfyui_temporal.contracts.comfyui import JobAccepted, TaskPriority
from comfyui_temporal.contracts.continuation import JobUpdate, PriceState
from comfyui_temporal.contracts.credits import Estimate, EstimateRequest
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.prices import UnknownPrice
from comfyui_temporal.contracts.task_store import RecordedPrices
from comfyui_temporal.contracts.tasks import ImageTask
from workflows.credit_hold import CreditHold
from workflows.failures import TaskFailed
from workflows.step_labels import STEP_LABELS
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord


class ImagePrice:
    """The job's price, the credits service's estimate and the price table."""

    def __init__(
        self, task: ImageTask, limits: TaskLimits, hold: CreditHold, record: TaskRecord, state: PriceState
    ) -> None:
        self._task = task
        self._labels = STEP_LABELS[task.scene]
        self._limits = limits
        self._hold = hold
        self._record = record
        self._state = state
        self._checked: Estimate | None = None

    def table(self) -> int:
        """The table's price. Raises TaskFailed `input_invalid` for an extra that is not offered."""
        try:
            return self._limits.policy.prices.image(**self._priced())
        except UnknownPrice as error:
            raise TaskFailed(FailureCode.INPUT_INVALID, f"The input is not valid: {error}.") from None

    def _priced(self) -> dict[str, Any]:
        """What the price depends on."""
        task = self._task
        return {
            "resolution": task.resolution.value,
            "accelerated": task.priority is TaskPriority.ACCELERATED,
            "extras": task.extras,
            "loras": len(task.loras),
            "images": task.images,
        }

    async def check_balance(self, *, n: int) -> None:
        """Read the estimate before anything is submitted, which the balance must cover. `n`: as in `agree`.

        Raises TaskFailed `insufficient_balance`, and as `CreditHold.estimate`.
        """
        if self._limits.policy.checks_balance_first:
            self._checked = await self._estimate(n, self._labels.price_check)
            await self._hold.check_balance(self._checked)

    async def agree(self, job: JobAccepted, table: int, *, n: int) -> int:
        """Points to hold: the larger of the job's price and the estimate.

        `n`: the attempt, for the estimate's key. Raises TaskFailed `price_mismatch` above the ceiling, and as
        `CreditHold.estimate`.
        """
        task = self._task
        estimate = self._checked or await self._estimate(n, self._labels.estimate)
        self._state.job_estimate = job.estimated_cost
        prices = RecordedPrices(job=job.estimated_cost, estimate=estimate.selected_cost, table=table)
        self._record.priced(prices, attempt=n)
        cost = max(job.estimated_cost, estimate.selected_cost)
        ceiling = task.max_credits or round(self._limits.policy.ceiling_factor * table)
        if cost > ceiling:
            raise TaskFailed(
                FailureCode.PRICE_MISMATCH,
                f"The job would cost {cost} points, more than the ceiling of {ceiling}; it was cancelled. "
                "Raise max_credits, or have the prices compared: all three are recorded on the task.",
            )
        return cost

    async def _estimate(self, n: int, summary: str) -> Estimate:
        task = self._task
        request = EstimateRequest(
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            template_id=task.template_id,
            scene=task.scene,
            resolution=task.resolution.value,
            priority=task.priority,
            extras=self._limits.policy.prices.points_of_order(**self._priced()),
        )
        return await self._hold.estimate(request, n=n, summary=summary)

    def cost_of(self, delivery: JobUpdate) -> int:
        """Points to charge (contract §5 *Charged*). Raises TaskFailed `reply_invalid` for a negative cost."""
        cost = delivery.actual_cost if delivery.actual_cost is not None else self._state.job_estimate
        if cost < 0:
            raise TaskFailed(FailureCode.REPLY_INVALID, f"ComfyUI states a cost of {cost} points; nothing is charged.")
        usable = self._hold.usable
        if cost > usable:
            self._record.record_exception(
                "cost_above_hold",
                ExceptionCode.COST_ABOVE_HOLD,
                f"The job cost {cost} points and {usable} are held; no more than the held points are charged.",
                actual_cost=cost,
                held=usable,
            )
        return min(cost, usable)
