"""How a task ends without a delivery.

    TaskEnd
    ├── TaskStopped    it was cancelled
    ├── RowEnded       an earlier life of the task has ended it
    └── TaskFailed     with a code of contract §1

Any other exception in workflow code is a bug or an eviction: it fails the workflow task and undoes nothing
(pitfall 9), so that a fixed worker continues where the broken one stopped.
"""

from __future__ import annotations

from temporalio.exceptions import ActivityError, ApplicationError, FailureError, TimeoutError, TimeoutType

from comfyui_temporal.contracts.errors import JOB_CODES, ErrorDetails, FailureCode, Refusal


class TaskEnd(Exception):
    """The task ends without a delivery; its job and hold are given back."""


class TaskStopped(TaskEnd):
    """A cancel was seen before a delivery."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason or "The task was cancelled.")


class RowEnded(TaskEnd):
    """The task's row has ended, is being given back, or belongs to another run: this run begins nothing more."""

    def __init__(self, *, is_unsent: bool = False) -> None:
        """`is_unsent`: the call that was stopped was never sent, so no undo has to learn what it made."""
        self.is_unsent = is_unsent
        super().__init__("The task had ended before this run was reset.")


class TaskFailed(TaskEnd):
    """The task fails with `code`; `error_details` where a job reported them."""

    def __init__(self, code: FailureCode, sentence: str, error_details: ErrorDetails | None = None) -> None:
        self.code = code
        self.error_details = error_details or ErrorDetails(code=code.value, message=sentence, retryable=False)
        super().__init__(sentence)

    @classmethod
    def by_refusal(cls, refusal: Refusal) -> TaskFailed:
        """A definite refusal ends the task with the refusal's code; `job_refused` with the job's own (contract §2)."""
        if refusal.error_details is not None:
            return cls.by_job(refusal.error_details)
        return cls(refusal.code, refusal.sentence)

    @classmethod
    def by_job(cls, details: ErrorDetails) -> TaskFailed:
        is_known = details.code in JOB_CODES or details.code == FailureCode.REPLY_INVALID
        code = FailureCode(details.code) if is_known else FailureCode.INTERNAL
        return cls(code, details.message or f"The job ended with {details.code}.", details)

    @classmethod
    def by_row(cls, error: ErrorDetails | None) -> TaskFailed:
        """The failure that a task's row holds."""
        details = error or ErrorDetails()
        known = {code.value for code in FailureCode}
        code = FailureCode(details.code) if details.code in known else FailureCode.INTERNAL
        return cls(code, details.message or f"The task had failed with {details.code}.", details)


def is_own_absence(error: FailureError) -> bool:
    """Whether the call's time passed although no attempt of it has failed at the other party.

    No worker of ours took it, or those that did were lost. An attempt in flight counts as the other party's silence.
    """
    cause = error.cause
    if not isinstance(error, ActivityError) or not isinstance(cause, TimeoutError) or error.started_event_id:
        return False
    last = cause.cause
    was_lost = isinstance(last, TimeoutError) and last.type is TimeoutType.HEARTBEAT
    is_over = cause.type in (TimeoutType.SCHEDULE_TO_CLOSE, TimeoutType.SCHEDULE_TO_START)
    return is_over and (last is None or was_lost)


def failure_from(error: FailureError, unavailable: FailureCode) -> TaskFailed:
    """The failure of an activity that gave up: its last attempt's code and sentence, else the code `unavailable`."""
    known = {code.value for code in FailureCode}
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ApplicationError) and cause.type in known:
            return TaskFailed(FailureCode(cause.type), cause.message)
        cause = cause.__cause__
    return TaskFailed(unavailable, f"The call got no answer in time ({error.cause or error}).")
