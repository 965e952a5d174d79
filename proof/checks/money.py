"""Money (invariants 1 and 2): what the credits service has against what the task reports.

Two things cannot be known on some services. The checks accept them only with an exception record of the right amount:

hold_doubled        Without idempotency, a repeat after a lost answer makes a second hold. Without ids in the ledger it
                    cannot be cancelled, so it stays. The record must hold exactly its points.
settlement_unknown  The task reports no charge (null), and a record says why it does not know.
"""

from __future__ import annotations

from typing import Final

from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.task_events import EventType
from comfyui_temporal.contracts.tasks import SettlementState
from proof.checks.finished_task import Exempt, Expected, Findings, FinishedTask, Rule

SAY_UNKNOWN: Final = frozenset(
    {
        ExceptionCode.SETTLEMENT_UNKNOWN.value,
        ExceptionCode.HOLD_LEFT_TO_EXPIRY.value,
        ExceptionCode.UNDO_UNFINISHED.value,
    }
)
"""Exception records that say that the fate of some points is unknown."""


def check_money(task: FinishedTask, expected: Expected, exempt: frozenset[Exempt], findings: Findings) -> None:
    """Each hold is resolved once. A completed task is charged once, any other nothing."""
    check_holds(task, exempt, findings)
    check_charges(task, expected, exempt, findings)
    check_credits(task, findings)
    check_points_in_events(task, exempt, findings)
    check_handed_out(task, expected, findings)


def check_holds(task: FinishedTask, exempt: frozenset[Exempt], findings: Findings) -> None:
    left = [hold for hold in task.holds if hold.phase == "open"]
    points, doubled = sum(hold.amount for hold in left), _doubled_points(task)
    named = ", ".join(f"{hold.pre_deduct_id} ({hold.amount})" for hold in left) or "none"
    recorded = f", {doubled} of their points are recorded as doubled" if doubled else ""
    is_true = points == doubled or Exempt.HOLD_EXPIRES in exempt
    findings.must(is_true, Rule.LEAKED_HOLD, f"holds are still open: {named}{recorded}")


def _doubled_points(task: FinishedTask) -> int:
    """Points of holds whose id was never learned. Where the ledger shows ids, a doubled hold has been cancelled."""
    if task.profile.keeps_keys or task.profile.tells_kinds:
        return 0
    return sum(int(details.get("amount", 0)) for code, details in task.records if code == ExceptionCode.HOLD_DOUBLED)


def check_charges(task: FinishedTask, expected: Expected, exempt: frozenset[Exempt], findings: Findings) -> None:
    taken, commits = task.charges.taken, task.charges.commits
    reported = task.row.credits.charged if task.row else 0
    findings.must(commits <= 1, Rule.DOUBLE_CHARGE, f"{commits} commits")
    is_paid_for = task.is_completed or (reported is None and Exempt.CHARGE_HIDDEN in exempt)
    findings.must(taken == 0 or is_paid_for, Rule.DOUBLE_CHARGE, f"{taken} points were charged for nothing")
    if expected.is_delivered and task.is_completed:
        times = commits + task.charges.charges
        findings.must(times == 1 and taken > 0, Rule.MISCHARGE, f"completed with {times} charges, {taken} points")
    if reported is None:
        is_recorded = bool(task.codes & SAY_UNKNOWN)
        findings.must(is_recorded, Rule.MISCHARGE, f"{taken} points were taken, none are reported, and no record why")
        return
    rule = Rule.DOUBLE_CHARGE if taken > reported else Rule.MISCHARGE
    is_exempt = taken > reported and Exempt.CHARGED_TWICE in exempt
    findings.must(taken == reported or is_exempt, rule, f"{taken} points were taken, {reported} are reported")


def check_credits(task: FinishedTask, findings: Findings) -> None:
    """What the row reports agrees with itself, and no event says that points came back where that is unknown."""
    if task.row is None or not task.has_ended:
        return
    credits = task.row.credits
    if credits.settlement is SettlementState.UNKNOWN:
        is_open = (credits.charged, credits.returned) == (None, None)
        findings.must(is_open, Rule.MISREPORTED, f"settlement is unknown, and yet: {credits}")
        says_so = [event for event in task.events if "not known" in (event.message or "")]
        moved = [event.credits_delta for event in says_so if event.credits_delta]
        findings.must(not moved, Rule.MISREPORTED, f"events that say that it is unknown move {moved} points")
        return
    findings.must(
        credits.settlement is SettlementState.SETTLED, Rule.MISREPORTED, f"the settlement is {credits.settlement}"
    )
    returned = max(0, credits.held - (credits.charged or 0))
    findings.must(credits.returned == returned, Rule.MISREPORTED, f"returned is not held - charged: {credits}")


def check_points_in_events(task: FinishedTask, exempt: frozenset[Exempt], findings: Findings) -> None:
    """The points that the events report add up to what was charged."""
    is_unknown = bool(task.codes & SAY_UNKNOWN) or (task.row is not None and task.row.credits.charged is None)
    if not task.has_ended or is_unknown or Exempt.POINTS_IN_EVENTS in exempt:
        return
    moved, taken = sum(event.credits_delta or 0 for event in task.events), task.charges.taken
    is_exempt = -moved < taken and Exempt.CHARGED_TWICE in exempt
    findings.must(moved == -taken or is_exempt, Rule.MISCHARGE, f"the events move {moved} points, {taken} were charged")


def check_handed_out(task: FinishedTask, expected: Expected, findings: Findings) -> None:
    """Results appear with the end of a completed task, and nowhere else (contract §5)."""
    row = task.row
    has_results = row is not None and bool(row.result_urls or row.output)
    if task.is_completed:
        findings.must(
            has_results or not expected.is_delivered, Rule.UNPAID_RESULT, "completed, and nothing was handed out"
        )
    else:
        findings.must(not has_results, Rule.UNPAID_RESULT, "the row hands something out")
        result = task.result or {}
        is_empty = not result.get("result_urls") and not result.get("output")
        findings.must(is_empty, Rule.UNPAID_RESULT, "the result hands something out")
    early = [event.event for event in task.events if event.result_urls or event.output]
    is_end = set(early) <= ({EventType.COMPLETED} if task.is_completed else set())
    findings.must(is_end, Rule.UNPAID_RESULT, f"events hand something out: {early}")
