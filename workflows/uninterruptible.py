"""The waits that neither a cancel nor the task's time interrupts, in one place, each with its reason.

Every other `await` in this folder goes through `InterruptibleWaits`, `Following` or a setup call. A test compares this
table with every `await`; docs/reliability.md shows it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Uninterruptible:
    """Waits with the same reason. `places`: their module, class and function."""

    what: str
    reason: str
    places: tuple[str, ...]


UNINTERRUPTIBLE: Final = (
    Uninterruptible(
        "settlement",
        "The job has delivered, and that cannot be undone. Commit, charge and ledger calls, and after a reset the "
        "reading of earlier histories, are retried without end (contract §4), and a renewal or give-back in flight "
        "ends first.",
        (
            "settlement.Settlement._ask_commit",
            "settlement.Settlement._left_by_earlier_lives",
            "settlement.Settlement._record_unknown",
            "charges.Charges._once",
            "charges.Charges._repeated",
            "ledger_search.LedgerSearch._search",
            "ledger_search.LedgerSearch._read_within",
            "ledger_search.LedgerSearch._fate_by_total",
            "ledger_search.LedgerSearch._entries",
            "credit_hold.CreditHold.settled_renewal",
        ),
    ),
    Uninterruptible(
        "undo",
        "The task ends. Everything that was begun is given back, without a time limit (contract §4), and none of its "
        "jobs keeps running.",
        (
            "undo.Undo.all",
            "attempts.Attempts.cancel_all",
            "attempts.Attempts._finally_cancelled",
            "attempts.Attempts._learn",
            "credit_hold.CreditHold.give_back",
            "task_holds.TaskHolds._all_released",
            "task_holds.TaskHolds._learn",
            "forgotten_jobs.ForgottenJobs.cancel",
            "forgotten_jobs.ForgottenJobs._learned",
            "forgotten_jobs.ForgottenJobs.delivery",
            "row_look.RowLook.once_back",
            "row_look.RowLook.once_all_has_landed",
            "row_look.RowLook.ended",
            "training_dataset.TrainingDataset.delete",
        ),
    ),
    Uninterruptible(
        "a look at the row",
        "A short local try, then 15 s at most: as the task ends, or before it is found to lack the balance, when "
        "nothing is begun.",
        ("row_look.RowLook.once",),
    ),
    Uninterruptible(
        "background calls",
        "The flow does not wait for them, or its wait can be interrupted. They give up when the task ends or the run "
        "continues as new.",
        (
            "attempts.Attempts._cancel",
            "credit_hold.CreditHold._request_renewal",
            "credit_hold.CreditHold._cover_after_gap",
            "credit_hold.CreditHold._returned_or_closing",
            "task_holds.TaskHolds._cancel",
        ),
    ),
    Uninterruptible(
        "the claim",
        "Nothing is begun before the id is claimed, and without the task store the end could not be recorded either. "
        "A run that is refused the id answers its updates and ends.",
        ("task_record.TaskRecord.claim", "task_flow.TaskFlow.accept"),
    ),
    Uninterruptible(
        "the event writer",
        "It runs in parallel with the flow for as long as the run is open.",
        (
            "task_record.TaskRecord.write_facts",
            "task_record.TaskRecord._publish_held_back",
            "task_record.TaskRecord._write_batch",
        ),
    ),
    Uninterruptible(
        "the end's events",
        "The task has ended: its last events are written and its updates answered before the run closes.",
        (
            "task_record.TaskRecord.all_written",
            "ending.TaskEnding._all_published",
            "give_back.OrphanedTask._publish_difference",
        ),
    ),
    Uninterruptible(
        "the update wait_until_held",
        "It only tells what the flow has decided, and is answered at the end at the latest.",
        ("start_answer.StartAnswers.given",),
    ),
    Uninterruptible(
        "the update cancel_task",
        "It is answered once the outcome is decided, which every interruptible wait does.",
        ("stop.Stop.cancel_task",),
    ),
    Uninterruptible(
        "continue-as-new",
        "The attempts in flight end within 10 s; a cancel ends the wait.",
        ("task_flow.TaskFlow.continue_as_new_if_long", "outside_call.OutsideCall.suspend"),
    ),
    Uninterruptible(
        "a cancelled call",
        "Its attempt in flight ends by its own limit: 10 s; a dataset's copy ends at its next heartbeat.",
        ("outside_call.OutsideCall.setup", "training_dataset.TrainingDataset.snapshot"),
    ),
    Uninterruptible(
        "a short local try",
        "It takes two seconds at most.",
        ("outside_call.OutsideCall._local_try", "outside_call.OutsideCall.read"),
    ),
    Uninterruptible(
        "building blocks",
        "Their callers can be interrupted or are in this table.",
        (
            "alarm.Alarm.until",
            "attempts.Attempts._pause",
            "interruptible.InterruptibleWaits.answered",
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
        "Their histories lack the timers that keeping a hold alive needs; a cancel interrupts them.",
        ("credit_hold.CreditHold._renewal_over",),
    ),
    Uninterruptible(
        "give-back, correction, reconciler, a worker's settings, the lists for the gateway",
        "They undo, or only read, and have no hold that could expire.",
        (
            "give_back.OrphanedRecord._write_batch",
            "give_back.OrphanedTask._repeat_charges",
            "give_back.OrphanedTask._delete_snapshot",
            "give_back.OrphanedTask._polled",
            "give_back.GiveBackWorkflow.run",
            "correction.Corrections.made",
            "correction.Corrections._look",
            "correction.Corrections._corrected",
            "reconciler.ReconcileWorkflow.run",
            "reconciler.ReconcileWorkflow._found_closed",
            "reconciler.ReconcileWorkflow._begin_give_back",
            "worker_settings.WorkerSettingsWorkflow.run",
            "template_list.TemplateListWorkflow.run",
            "dataset_list.DatasetListWorkflow.run",
        ),
    ),
)
