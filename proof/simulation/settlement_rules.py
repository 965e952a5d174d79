"""What a task was charged in the end, compared with its cost. A shortfall needs a reason that the services saw."""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.credits import LedgerKind
from comfyui_temporal.contracts.errors import Answer, ExceptionCode
from comfyui_temporal.contracts.size_budget import MAX_KEPT_HOLDS
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import CreditsSummary, SettlementState
from proof.simulation.calls import Call
from proof.simulation.hold_rules import HoldRules
from proof.simulation.invariants import World, must
from proof.simulation.price_rules import Prices

LOOKS_FOR_SECONDS: Final = 600.0
"""How long a ledger is searched (contract §4): what it shows later is not known."""
_RESOLVING: Final = frozenset({LedgerKind.COMMIT, LedgerKind.CANCEL, LedgerKind.EXPIRE})


class SettlementRules:
    """Judges the charges once the task has ended. Each method raises InvariantViolated."""

    def __init__(self, world: World, prices: Prices, holds: HoldRules) -> None:
        self._world = world
        self._prices = prices
        self._holds = holds
        self.shortfall = 0
        """Points that the task costs and that were not charged."""

    @property
    def is_unknown(self) -> bool:
        return ExceptionCode.SETTLEMENT_UNKNOWN in self._world.recorded_codes()

    @property
    def held(self) -> int:
        """Points of the last hold that there was."""
        hold = self._holds.last()
        return hold.amount if hold else 0

    @property
    def usable(self) -> int:
        """Points of it that may be charged: what was granted beyond the request is never used."""
        hold = self._holds.last()
        return min(hold.amount, hold.asked) if hold else 0

    def check(self, charged: int, reported: CreditsSummary) -> None:
        """`reported` is what the row reports; the shared rules compare the result's credits with it."""
        if self._world.is_completed:
            self._check_price(charged)
        self._check_reported(charged, reported)
        self._check_sum_of_events(charged, is_known=reported.settlement is SettlementState.SETTLED)

    # After a reset

    def check_after_reset(self, charged: int) -> None:
        """What is charged is the price of a job that was delivered, under a hold of any life."""
        prices = self._prices_of_all_lives()
        if charged > max(prices | {0}) and self.may_be_charged_twice:
            return
        must(charged <= max(prices | {0}), "charged more than any of the jobs costs:", charged, *sorted(prices))
        if self._world.is_completed and charged not in prices:
            may_be_short = self._may_be_short_after_reset(charged, prices)
            must(may_be_short, f"charged {charged} after a reset without a reason, right is one of", *sorted(prices))

    def _prices_of_all_lives(self) -> set[int]:
        held = {min(hold.amount, hold.asked) for hold in self._world.parties.credits.holds} or {0}
        return {
            self._prices.of_delivery(attempt, points)
            for attempt in self._world.witness.attempts.values()
            if (work := self._world.works.get(attempt.job_id or "")) is not None and work.state.has_succeeded()
            for points in (held if self._world.scenario.is_image else {0})
        }

    def _may_be_short_after_reset(self, charged: int, prices: set[int]) -> bool:
        """A refused charge or amount, or what another life's commit left; or it is unknown for a cause."""
        terms, records = self._world.parties.credits.terms, self._world.parties.store.exceptions.values()
        left = [record.details.get("shortfall", 0) for record in records if record.code == ExceptionCode.SHORTFALL]
        if terms.commits_less or any(points > 0 and charged + points in prices for points in left):
            return True
        return self.is_unknown and bool(self._commits_refused() or self._is_charge_unanswered() or terms.lag_seconds)

    def _check_price(self, charged: int) -> None:
        attempt = self._world.witness.attempt
        assert attempt is not None
        price = self._prices.of_delivery(attempt, self.usable)
        self.shortfall = price - charged
        if self.shortfall < 0 and self.may_be_charged_twice:
            self.shortfall = 0
        must(self.shortfall >= 0, f"charged {charged}, more than it costs:", price)
        if self.is_unknown:
            self._check_unknown()
        elif self.shortfall:
            must(self._may_be_short(price), f"charged {charged} of {price} points without a reason to charge less")

    @property
    def may_be_charged_twice(self) -> bool:
        """Exempt.CHARGED_TWICE: no keys are kept, and the ledger shows a charge only after the search has ended."""
        terms = self._world.parties.credits.terms
        return terms.is_field and terms.lag_seconds >= LOOKS_FOR_SECONDS and self._is_charge_unanswered()

    def _check_unknown(self) -> None:
        """Only what was refused or unreadable, or what the ledger does not show in time, is unknown."""
        refused = [message for _, message in self._world.witness.refusals("cancel_hold")]
        is_hold_unknown = any("already_processed" in message for message in refused)
        has_doubt = self._commits_refused() or self._is_answered_otherwise() or self._is_charge_unanswered()
        has_doubt = has_doubt or is_hold_unknown
        must(bool(has_doubt), "settlement_unknown although no commit was refused")
        self._check_searched()
        committed = {call.argument.body.pre_deduct_id for call in self._world.witness.calls["commit"]}
        looks = [call.outcome.reply.entries for call in self._world.witness.calls["ledger"] if call.outcome is not None]
        shown = [entry for entries in looks for entry in entries if entry.pre_deduct_id in committed]
        must(not any(entry.kind in _RESOLVING for entry in shown), "settlement_unknown although the ledger shows it")

    def _check_searched(self) -> None:
        """The ledger was read for ten minutes, and what it shows of the hold's end by then was looked for in vain."""
        doubted_at, looks = self._doubted_at(), self._world.witness.calls.get("ledger", [])
        keys = {key.partition(":") for key in self._world.parties.store.exceptions}
        is_recorded = any(what == "settlement_unknown" and (not of or of.isdigit()) for what, _, of in keys)
        if doubted_at is None or not is_recorded:
            return
        looked_until = max((look.resolved_at or look.scheduled_at for look in looks), default=0.0)
        is_searched = looked_until >= doubted_at + LOOKS_FOR_SECONDS - 1
        must(is_searched, f"settlement_unknown although the ledger was read for {looked_until - doubted_at:g} s")
        terms, account = self._world.parties.credits.terms, self._world.parties.credits.account
        is_readable = terms.tells_kinds and not any(look.outcome is None for look in looks)
        if not is_readable or self._is_charge_unanswered():
            return
        committed = {call.argument.body.pre_deduct_id for call in self._world.witness.calls["commit"]}
        ends = [at for at, e in account.entries if e.pre_deduct_id in committed and e.kind in _RESOLVING]
        is_shown = any(at + terms.lag_seconds < doubted_at + LOOKS_FOR_SECONDS - 1 for at in ends)
        must(not is_shown, "settlement_unknown although the ledger shows the end within ten minutes")

    def _doubted_at(self) -> float | None:
        """When the run first learned that a commit is in doubt."""
        commits = [call for call in self._world.witness.calls.get("commit", ()) if call.resolved_at is not None]
        refused = [
            call.resolved_at
            for call in commits
            if call.outcome is None or (isinstance(call.outcome, Answer) and call.outcome.refusal is not None)
        ]
        return min((at for at in refused if at is not None), default=None)

    def _commits_refused(self) -> list[str]:
        unreadable = ["unreadable" for call in self._world.witness.calls.get("commit", ()) if call.outcome is None]
        return [message for _, message in self._world.witness.refusals("commit")] + unreadable

    def _is_answered_otherwise(self) -> bool:
        """Whether a commit was answered with another amount than was sent."""
        commits = [call for call in self._world.witness.calls["commit"] if isinstance(call.outcome, Answer)]
        replies = [(call.argument.body.actual_cost, call.outcome.reply) for call in commits]
        return any(reply is not None and reply.frozen_amount != sent for sent, reply in replies)

    def _is_charge_unanswered(self) -> bool:
        return any(call.outcome is None for call in self._world.witness.calls.get("charge", ()))

    def _may_be_short(self, price: int) -> bool:
        policy, witness = self._world.scenario.policy, self._world.witness
        if witness.refusals("charge") or self._world.parties.credits.terms.commits_less:
            return True
        if policy.charge_shortfall:
            return False
        if any(message == "hold_insufficient" for message in self._commits_refused()):
            return True
        return price > self.usable and self._may_be_held_short()

    def _may_be_held_short(self) -> bool:
        """The price rose above the hold with the last report or while a hold was requested, or it was refused."""
        witness, attempt = self._world.witness, self._world.witness.attempt
        assert attempt is not None
        last = witness.reports_of(attempt.job_id)[-1]
        granted = self._holds.granted()
        since = granted[-1].resolved_at if granted else 0.0
        if any(at >= since for at, _ in witness.refusals("pre_deduct")):
            return True
        # The next hold is requested once the one before the present hold is given back.
        calls = [*witness.calls.get("pre_deduct", ()), *witness.calls.get("cancel_hold", ())]
        asking = [
            call for call in calls if (call.resolved_at or last.at) >= last.at or self._is_looked_up(call, last.at)
        ]
        is_heard_at_once = self._holds.followed_since(attempt) >= last.at
        return bool(asking) or is_heard_at_once or self._prices.known_before(attempt, last) <= self.usable

    def _is_looked_up(self, call: Call, at: float) -> bool:
        """Whether the ledger is still searched for the end of a hold, whose cancel was refused."""
        is_refused = isinstance(call.outcome, Answer) and call.outcome.refusal is not None
        return call.name == "cancel_hold" and is_refused and (call.resolved_at or at) + LOOKS_FOR_SECONDS >= at

    def _check_reported(self, charged: int, reported: CreditsSummary) -> None:
        estimate = self._last_estimate()
        must(reported.estimated == estimate, "the row's estimate:", reported.estimated, estimate)
        must(reported.held == self.held, "the row says held:", reported.held, self.held)
        ids = [known.pre_deduct_id for known in self._holds.granted()]
        must(reported.pre_deduct_count == len(ids), "the row counts the holds:", reported.pre_deduct_count, len(ids))
        # A long wait renews its hold more often than the row names: it names the newest.
        must(reported.pre_deduct_ids == ids[-MAX_KEPT_HOLDS:], "the row names the holds:", *reported.pre_deduct_ids)
        codes = self._world.recorded_codes()
        is_left = ExceptionCode.HOLD_LEFT_TO_EXPIRY in codes and not charged
        is_left = is_left or any(key.startswith("undo_hold:") for key in self._world.parties.store.exceptions)
        if self.is_unknown or is_left:
            is_reported = reported.settlement is SettlementState.UNKNOWN
            is_known = not self.is_unknown or self._is_shown_since()
            must(is_reported or is_known, "what is unknown is reported as known:", reported)
            return
        must(reported.settlement is not SettlementState.UNKNOWN, "what is known is reported as unknown:", reported)
        must(reported.shortfall == self.shortfall, "the row says short:", reported.shortfall, self.shortfall)

    def _is_shown_since(self) -> bool:
        """Whether the ledger was read again since the record, and showed how each hold of the task ended."""
        records = self._world.parties.store.exceptions.values()
        unknown = [record.ts for record in records if record.code == ExceptionCode.SETTLEMENT_UNKNOWN]
        recorded_at = max(unknown).timestamp()
        looks = [look for look in self._world.witness.calls.get("ledger", ()) if look.scheduled_at > recorded_at]
        entries = looks[-1].outcome.reply.entries if looks and looks[-1].outcome is not None else []
        shown = [entry.kind or entry.reason for entry in entries]
        ended = sum(what in _RESOLVING for what in shown)
        return 0 < shown.count(LedgerKind.PRE_DEDUCT) <= ended

    def _last_estimate(self) -> int:
        newest = max(self._world.witness.attempts, default=0)  # an estimate may be read for the attempt after it
        reported = [self._world.witness.reply("estimate", n) for n in range(newest + 1, -1, -1)]
        return next((reply.selected_cost for reply in reported if reply is not None), 0)

    def _check_sum_of_events(self, charged: int, *, is_known: bool) -> None:
        """The points in the events add up to what the task was charged. `is_known`: the row says how it was settled."""
        events = self._world.parties.store.events
        moved = sum(event.credits_delta or 0 for event in events if event.event is EventType.CREDITS)
        exempt = {ExceptionCode.SETTLEMENT_UNKNOWN, ExceptionCode.HOLD_LEFT_TO_EXPIRY} & self._world.recorded_codes()
        not_found = [message for _, message in self._world.witness.refusals("cancel_hold") if "not_found" in message]
        is_twice = -moved < charged and self.may_be_charged_twice
        must(
            bool((exempt and not is_known) or not_found or is_twice) or moved == -charged,
            f"the events move {moved} points, charged were",
            charged,
        )
