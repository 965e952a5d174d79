"""A training's price: estimated, confirmed, and held again as its GPU hours grow (contract §4, §5). In points."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, NamedTuple

from temporalio import workflow

from comfyui_temporal.contracts.comfyui import Checkpoint, TaskPriority
from comfyui_temporal.contracts.continuation import JobUpdate, PriceState
from comfyui_temporal.contracts.credits import Estimate, EstimateRequest, PriceOption
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.prices import UnknownPrice
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.task_store import PriceToConfirm, RecordedPrices
from comfyui_temporal.contracts.tasks import TrainingTask
from workflows.credit_hold import CreditHold
from workflows.failures import TaskFailed
from workflows.interruptible import InterruptibleWaits
from workflows.step_labels import STEP_LABELS
from workflows.task_limits import TaskLimits
from workflows.task_record import TaskRecord

EACH_ASKING: Final = "price-asked-for-again-published"


class Quote(NamedTuple):
    """A price, and the estimate that it was made from."""

    cost: int
    estimate: Estimate


class TrainingPrice:
    """What the payer confirmed is the ceiling. Beyond it the training asks again and stops at a checkpoint."""

    def __init__(
        self,
        task: TrainingTask,
        limits: TaskLimits,
        hold: CreditHold,
        record: TaskRecord,
        waits: InterruptibleWaits,
        state: PriceState,
    ) -> None:
        self._task = task
        self._labels = STEP_LABELS[task.scene]
        self._limits = limits
        self._hold = hold
        self._record = record
        self._waits = waits
        self.state = state
        self._dataset_summary = ""
        if task.max_credits is not None:
            self.state.ceiling = max(self.state.ceiling, task.max_credits)

    def raise_ceiling(self, max_credits: int) -> int:
        """The update `confirm_price`. Returns the ceiling in force; it is only ever raised."""
        self.state.ceiling = max(self.state.ceiling, max_credits)
        return self.state.ceiling

    def check_base_model(self) -> None:
        """Raise TaskFailed `input_invalid` for a base model without a price."""
        try:
            self._limits.policy.prices.check_base_model(self._task.base_model)
        except UnknownPrice as error:
            raise TaskFailed(FailureCode.INPUT_INVALID, f"The input is not valid: {error}.") from None

    def of(self, gpu_hours: float) -> int:
        """The table's price of a training that uses `gpu_hours`."""
        return self._limits.policy.prices.training(
            base_model=self._task.base_model,
            accelerated=self._task.priority is TaskPriority.ACCELERATED,
            gpu_hours=gpu_hours,
        )

    @property
    def expected_gpu_hours(self) -> float:
        """Hours over all attempts: up to the checkpoint resumed from, plus the present attempt's estimate."""
        return self.state.carried_gpu_hours + self.state.gpu_hours

    def created(self, gpu_hours: float, dataset_summary: str | None = None) -> None:
        """A training was created: ComfyUI's estimate of this attempt's hours, and what it trains on."""
        self.state.gpu_hours = gpu_hours
        self._dataset_summary = dataset_summary or ""

    # Before the dataset is copied

    async def check_balance(self) -> None:
        """Read the estimate without GPU hours, which only ComfyUI knows; the balance must cover it.

        Raises TaskFailed `insufficient_balance`, and as `CreditHold.estimate`.
        """
        if self._limits.policy.checks_balance_first:
            await self._hold.check_balance(await self._estimate(0.0, n=0, summary=self._labels.price_check))

    # Before the hold: estimate, confirm

    async def agree(self, *, n: int) -> Quote:
        """The price to confirm and hold. `n`: the attempt, for the key. Raises as `CreditHold.estimate`."""
        hours = self.expected_gpu_hours
        estimate = await self._estimate(hours, n=n, summary=self._labels.estimate)
        table = self.of(hours)
        self._record.priced(RecordedPrices(estimate=estimate.selected_cost, table=table), attempt=n)
        return Quote(self.larger(estimate.selected_cost, table), estimate)

    async def _estimate(self, hours: float, *, n: int, summary: str) -> Estimate:
        task = self._task
        request = EstimateRequest(
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            template_id=task.template_id,
            scene=task.scene,
            resolution=task.base_model,
            priority=task.priority,
            gpu_hours=hours,
        )
        return await self._hold.estimate(request, n=n, summary=summary)

    def larger(self, estimate: int, table: int) -> int:
        """The larger of the estimate and the table's price (contract §5).

        An estimate may ignore the GPU hours, or be 0: what is charged goes by the table.
        """
        if table > estimate and workflow.patched("training-held-by-the-table-too"):
            return table
        return estimate

    async def confirmed(self, quote: Quote, not_after: datetime | None) -> int:
        """Wait until the price is confirmed, and return it.

        Raises TaskFailed `price_not_confirmed`, or as `InterruptibleWaits.until`.
        """
        cost = quote.cost
        if cost <= self.state.ceiling:
            return cost
        confirm_by = self._confirm_by()
        for limit in (not_after, self._waits.latest() if self._waits.keeps_hold() else None):
            confirm_by = min(confirm_by, limit or confirm_by)
        message = f"The training costs {cost} points; it waits for confirm_price. {self._dataset_summary}".rstrip()
        self._request_confirmation(cost, message, confirm_by=confirm_by, estimate=quote.estimate)
        is_confirmed = await self._waits.until(
            lambda: self.state.ceiling >= cost, at=confirm_by, summary="3 wait: the payer confirms"
        )
        if not is_confirmed:
            raise TaskFailed(
                FailureCode.PRICE_NOT_CONFIRMED,
                f"The price of {cost} points was not confirmed until {confirm_by.isoformat()}; nothing was charged.",
            )
        self._record.confirming(None)
        return cost

    def _confirm_by(self) -> datetime:
        return workflow.now() + timedelta(seconds=self._limits.confirm_within_seconds)

    def _request_confirmation(
        self,
        cost: int,
        message: str,
        *,
        confirm_by: datetime,
        is_running: bool = False,
        estimate: Estimate | None = None,
    ) -> None:
        confirmation = PriceToConfirm(
            estimated_cost=cost,
            options=self._options(cost, estimate),
            current_balance=estimate.current_balance if estimate else None,
            suggest_topup=self._topup(cost, estimate) if estimate else None,
            confirm_by=confirm_by,
            is_running=is_running,
        )
        self._record.confirming(confirmation)
        self._record.publish(self._next_key(cost), EventType.CREDITS, confirmation=confirmation, message=message)

    def _next_key(self, cost: int) -> str:
        """The fact's key. A price may be asked for, replaced by another one, and asked for again."""
        key, asked_before = f"confirm:{self._record.state.attempts}:{cost}", self.state.askings
        self.state.askings += 1
        return f"{key}:{asked_before}" if asked_before and workflow.patched(EACH_ASKING) else key

    def _topup(self, cost: int, estimate: Estimate) -> int | None:
        """Points that the balance lacks beside the hold that stands: its points come back for a dearer one.

        The service computes them for its own estimate, which may be the smaller price.
        """
        standing = self._hold.standing
        held = standing.amount if standing is not None else 0
        suggested = None if estimate.suggest_topup is None else max(0, estimate.suggest_topup - held)
        if estimate.current_balance is None:
            return suggested
        return max(suggested or 0, cost - estimate.current_balance - held)

    def _options(self, cost: int, estimate: Estimate | None) -> list[PriceOption]:
        """The estimate's options; the chosen one never shows less than the price to confirm."""
        options = (estimate.options if estimate else None) or []
        chosen = self._task.priority.value
        return [
            option.model_copy(update={"total_cost": max(option.total_cost, cost)})
            if option.priority == chosen
            else option
            for option in options
        ]

    # While it runs: refreshed, as a concern of the follow loop

    def job_updated(self, update: JobUpdate) -> None:
        """Take hours and checkpoint from an update that was applied."""
        if update.gpu_hours is not None:
            self.state.gpu_hours = update.gpu_hours
        if update.checkpoint is not None and self._adds_nothing(update.checkpoint):
            return
        if update.checkpoint is not None and update.checkpoint != self.state.checkpoint:
            is_new = self.state.checkpoint is None or update.checkpoint.uri != self.state.checkpoint.uri
            self.state.checkpoint = update.checkpoint
            if is_new:
                self._publish_checkpoint(update, update.checkpoint)

    def _adds_nothing(self, checkpoint: Checkpoint) -> bool:
        """Whether an attempt resumed from it: its hours count already, and this message adds none.

        Compared by uri: a training may report the hours of all attempts, and an earlier checkpoint than its own first.
        """
        state = self.state
        known = checkpoint.uri in (self._task.resume_from, state.resume_from, *state.resumed_from)
        return known and workflow.patched("checkpoint-resumed-from-adds-nothing")

    def _publish_checkpoint(self, update: JobUpdate, checkpoint: Checkpoint) -> None:
        self._hold.checkpoint_passed()
        self._record.publish(
            f"checkpoint:{update.job_id}:{update.sequence}",
            EventType.CHECKPOINT,
            message=f"Checkpoint at epoch {checkpoint.epoch}, step {checkpoint.step}.",
        )

    def has_update(self) -> bool:
        """Whether the price that waits to be confirmed is confirmed now."""
        confirmation = self._record.state.confirmation
        return confirmation is not None and self.state.ceiling >= confirmation.estimated_cost

    def due(self) -> datetime | None:
        return None

    def check(self) -> None:
        """Hold more when the price rises above the hold, up to the ceiling; beyond it ask again.

        Raises TaskFailed `price_not_confirmed` at the next checkpoint after asking.
        """
        price = self.of(self.expected_gpu_hours)
        self._hold.require(min(price, self.state.ceiling))
        if price <= max(self._hold.covered, self.state.ceiling):
            self._answered()
        else:
            self._beyond_ceiling(price)

    def _beyond_ceiling(self, price: int) -> None:
        here = self.state.checkpoint.uri if self.state.checkpoint else ""
        if self.state.asked_at_checkpoint not in (None, here):
            raise TaskFailed(
                FailureCode.PRICE_NOT_CONFIRMED,
                f"The training's price rose to {price} points, above the confirmed {self.state.ceiling}; "
                "it was stopped at its checkpoint and nothing is charged.",
            )
        self.state.asked_at_checkpoint = here
        confirmation = self._record.state.confirmation
        if confirmation is None or confirmation.estimated_cost != price:
            self._request_confirmation(
                price,
                f"The training now costs {price} points, and {self.state.ceiling} are confirmed. It runs on; unless "
                "the price is confirmed it stops at its next checkpoint.",
                confirm_by=self._confirm_by(),
                is_running=True,
            )

    def _answered(self) -> None:
        if self.state.asked_at_checkpoint is not None:
            self.state.asked_at_checkpoint = None
            self._record.confirming(None)

    # Between attempts

    def resume_from_checkpoint(self) -> None:
        """The next attempt resumes from the newest checkpoint; hours after it are lost and cost nothing."""
        checkpoint = self.state.checkpoint
        if checkpoint is not None:
            self.state.resume_from = checkpoint.uri
            self.state.resumed_from.append(checkpoint.uri)
            self.state.carried_gpu_hours += checkpoint.gpu_hours_used
            self.state.checkpoint = None
        self.state.gpu_hours = 0.0
        self._answered()

    def cost_of(self, delivery: JobUpdate) -> int:
        """Points to charge: the price of the hours used, never above what was confirmed (contract §5 *Charged*)."""
        used = delivery.gpu_hours_used if delivery.gpu_hours_used is not None else self.state.gpu_hours
        return min(self.of(self.state.carried_gpu_hours + used), self.state.ceiling)
