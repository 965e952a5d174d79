"""The waits that obey neither a cancel nor the task's time, in one place, each with its reason.

Every other `await` of this folder goes through `Waiting`, `Following` or an opening call, which obey. A test walks
through all of them and compares with this table; docs/reliability.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Uninterruptible:
    """Waits of one reason. `places`: module, class and function in which they stand."""

    what: str
    reason: str
    places: tuple[str, ...]


UNINTERRUPTIBLE: Final = (
    Uninterruptible(
        "settlement",
        "The work was delivered: nothing undoes it. Commit, charge and the ledger are asked without end (contract §4), "
        "and a renewal or give-back in flight ends first.",
        (
            "settlement.Settlement._ask_commit",
            "charges.Charges._once",
            "charges.Charges._repeated",
            "ledger_search.LedgerSearch._looked",
            "ledger_search.LedgerSearch._reading",
            "ledger_search.LedgerSearch._fate_by_total",
            "ledger_search.LedgerSearch._entries",
            "credit_hold.CreditHold.settled_renewal",
        ),
    ),
    Uninterruptible(
        "undo",
        "The task ends: what was begun is given back until that lands (contract §4), and no job of it runs on.",
        (
            "undo.Undo.all",
            "attempts.Attempts.cancel_all",
            "attempts.Attempts._finally_cancelled",
            "attempts.Attempts._learn",
            "credit_hold.CreditHold.give_back",
            "task_holds.TaskHolds._all_left",
            "task_holds.TaskHolds._learn",
            "forgotten_jobs.ForgottenJobs.cancel",
            "forgotten_jobs.ForgottenJobs.delivery",
            "row_look.RowLook.once",
            "row_look.RowLook.once_all_has_landed",
            "row_look.RowLook.ended",
            "training_dataset.TrainingDataset.delete",
        ),
    ),
    Uninterruptible(
        "beside the flow",
        "The flow does not wait for it, or waits obeying. It gives up where the task ends or the run continues as new.",
        (
            "attempts.Attempts._cancel",
            "credit_hold.CreditHold._ask_renewing",
            "credit_hold.CreditHold._cover_again",
            "credit_hold.CreditHold._returned_or_closing",
            "task_holds.TaskHolds._cancel",
        ),
    ),
    Uninterruptible(
        "the claim",
        "Nothing is begun before the id is claimed, and without the task store no end could be told either.",
        ("task_record.TaskRecord.claim",),
    ),
    Uninterruptible(
        "the event writer",
        "It runs beside the flow for as long as the run lives.",
        (
            "task_record.TaskRecord.write_facts",
            "task_record.TaskRecord._publish_held_back",
            "task_record.TaskRecord._write_batch",
        ),
    ),
    Uninterruptible(
        "the end's events",
        "The task has ended: its last events are written and updates answered before its run closes.",
        (
            "task_record.TaskRecord.all_written",
            "task_flow.TaskFlow.all_published",
            "give_back.LeftTask._publish_difference",
        ),
    ),
    Uninterruptible(
        "the update cancel_task",
        "It is answered once it is decided, which every wait that obeys does.",
        ("stop.Stop.cancel_task",),
    ),
    Uninterruptible(
        "continue-as-new",
        "The attempts in flight end within 10 s; a stop cuts it short.",
        ("task_flow.TaskFlow.continue_as_new_if_long", "outside_call.OutsideCall.suspend"),
    ),
    Uninterruptible(
        "a call that was put down",
        "Its attempt in flight ends by its own limit: 10 s, a dataset's copy as soon as it hears of it.",
        ("outside_call.OutsideCall.setup", "training_dataset.TrainingDataset.snapshot"),
    ),
    Uninterruptible(
        "a short local try",
        "Two seconds at most.",
        ("outside_call.OutsideCall._local_try", "outside_call.OutsideCall.read"),
    ),
    Uninterruptible(
        "what the waits are made of",
        "Who calls them obeys, or stands in this table.",
        (
            "alarm.Alarm.until",
            "attempts.Attempts._pause",
            "interruptible.Waiting.answered",
            "stop.Stop.uninterrupted",
            "outside_call.OutsideCall.until_answered",
            "outside_call.OutsideCall.in_background",
            "outside_call.OutsideCall.write_store",
            "outside_call.OutsideCall.read_store",
            "outside_call.OutsideCall.wait_for",
            "outside_call.OutsideCall.wait_unless_stopped",
        ),
    ),
    Uninterruptible(
        "runs of release 0.1.0",
        "Their histories do not hold the timers that looking after a hold takes; a cancel is obeyed.",
        ("credit_hold.CreditHold._renewal_over",),
    ),
    Uninterruptible(
        "give-back, correction, reconciler",
        "They undo, look up or look around, and hold nothing that could run out.",
        (
            "give_back.LeftRecord._write_batch",
            "give_back.LeftTask._repeat_charges",
            "give_back.LeftTask._delete_snapshot",
            "give_back.LeftTask._asked",
            "give_back.GiveBackWorkflow.run",
            "correction.Corrections.made",
            "correction.Corrections._look",
            "correction.Corrections._corrected",
            "reconciler.ReconcileWorkflow.run",
            "reconciler.ReconcileWorkflow._found_closed",
            "reconciler.ReconcileWorkflow._begin_give_back",
        ),
    ),
)
