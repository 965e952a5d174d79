"""What a task costs and what it may hold (contract §5): from the input, the policy and what the services stated."""

from __future__ import annotations

from comfyui_temporal.contracts.comfyui import TrainingState
from proof.simulation.invariants import World, must
from proof.simulation.witness import Attempt, Report


class Prices:
    """The prices of one task, in points."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._scenario = world.scenario

    @property
    def ceiling(self) -> int:
        """The most that may be held: what the payer set or confirmed, an image's default being twice the table."""
        task, policy = self._scenario.task, self._scenario.policy
        if self._scenario.is_image:
            return task.max_credits or round(policy.ceiling_factor * self._scenario.table_price)
        return max(task.max_credits or 0, *self._world.witness.confirmed.values(), 0)

    def ceiling_before(self, at: float) -> int:
        """A training's ceiling as it was before a point in time. A reset may forget what was confirmed before it."""
        since = self._world.reset_at
        confirmed = [points for when, points in self._world.witness.confirmed.items() if since <= when < at]
        return max(self._scenario.task.max_credits or 0, *confirmed, 0)

    def stated(self, attempt: Attempt) -> dict[str, int]:
        """The prices compared for an attempt: job's, estimate, table; empty where the run received too few."""
        estimate = self._world.witness.reply("estimate", attempt.n)
        is_compared = not self._scenario.is_image or self._world.witness.was_accepted(attempt)
        return self._compared(attempt, estimate.selected_cost) if estimate is not None and is_compared else {}

    def answered(self, attempt: Attempt) -> dict[str, int]:
        """The same by the services' answers, although the run may have been reset before it recorded them."""
        estimate = self._world.parties.credits.account.estimates.get(attempt.n)
        return self._compared(attempt, estimate) if estimate is not None else {}

    def _compared(self, attempt: Attempt, estimate: int) -> dict[str, int]:
        if attempt.accepted is None:
            return {}
        prices = {"estimate": estimate, "table": self._table(attempt)}
        return prices | {"job": attempt.accepted.estimated_cost} if self._scenario.is_image else prices

    def _table(self, attempt: Attempt) -> int:
        if self._scenario.is_image:
            return self._scenario.table_price
        return self.of_hours(self.carried_hours(attempt) + attempt.accepted.gpu_hours)

    def asked(self, attempt: Attempt) -> set[int]:
        """What may be held for an attempt when it begins."""
        stated = self.stated(attempt)
        if not stated:
            return set()
        if self._scenario.is_image:
            return {max(stated["job"], stated["estimate"])}
        return {max(stated["estimate"], stated["table"])}

    def of_known_hours(self, attempt: Attempt) -> set[int]:
        """A training's prices by every number of hours that was reported."""
        if self._scenario.is_image or attempt.accepted is None:
            return set()
        carried = self.carried_hours(attempt)
        return {self.of_hours(carried + hours) for hours in self._hours_known(attempt)}

    def refreshed(self, attempt: Attempt) -> set[int]:
        """What a training's hold may be raised to: the price of the hours known, under the ceiling of then."""
        ceilings = {self._scenario.task.max_credits or 0, *self._world.witness.confirmed.values(), self.ceiling}
        prices = self.of_known_hours(attempt)
        return prices | {min(price, ceiling) for price in prices for ceiling in ceilings}

    def _hours_known(self, attempt: Attempt) -> set[float]:
        reports = self._world.witness.reports_of(attempt.job_id)
        reported = {report.state.gpu_hours for report in reports if isinstance(report.state, TrainingState)} - {None}
        return {attempt.accepted.gpu_hours, *reported}

    def known_before(self, attempt: Attempt, last: Report) -> int:
        """The price on which the task could act before a training's last report, under the ceiling."""
        witness, hours = self._world.witness, attempt.accepted.gpu_hours
        for report in witness.reports_of(attempt.job_id):
            is_before = witness.acted_on_from(report) < last.at
            if is_before and isinstance(report.state, TrainingState) and report.state.gpu_hours is not None:
                hours = report.state.gpu_hours
        return min(self.of_hours(self.carried_hours(attempt) + hours), self.ceiling)

    def carried_hours(self, attempt: Attempt) -> float:
        """Hours of earlier attempts that count: up to each checkpoint that a later one resumed from."""
        attempts = [other for other in self._world.witness.attempts.values() if other.n <= attempt.n]
        resumed_from = {other.call.argument.body.resume_from for other in attempts} - {None}
        return sum(self._world.parties.trainings.hours_at.get(uri, 0.0) for uri in sorted(resumed_from))

    def of_hours(self, hours: float) -> int:
        task = self._scenario.task
        return self._scenario.policy.prices.training(
            base_model=task.base_model,  # type: ignore[union-attr]
            accelerated=self._scenario.is_accelerated,
            gpu_hours=hours,
        )

    def of_delivery(self, attempt: Attempt, held: int) -> int:
        """What delivered work costs its payer: never more than was held (image) or confirmed (training)."""
        work = self._world.works.get(attempt.job_id or "")
        must(work is not None and work.state.has_succeeded(), "completed without delivered work:", attempt.job_id)
        assert work is not None
        if self._scenario.is_image:
            asked = work.state.actual_cost if work.state.actual_cost is not None else attempt.accepted.estimated_cost
            return int(min(asked, held))
        hours = work.state.gpu_hours_used if work.state.gpu_hours_used is not None else work.state.gpu_hours or 0.0
        return min(self.of_hours(self.carried_hours(attempt) + hours), self.ceiling_at_settlement)

    ceiling_at_settlement: int = 0
    """The ceiling when the price was fixed: a later confirmation raises no charge."""
