"""The failure that a task ends with, from a job, a refusal or an activity."""

from __future__ import annotations

import pytest
from temporalio.exceptions import ActivityError, ApplicationError, RetryState, TimeoutError, TimeoutType

from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode, Refusal
from workflows.failures import RowEnded, TaskFailed, TaskStopped, failure_from

UNAVAILABLE = FailureCode.CREDITS_UNAVAILABLE
OUT_OF_MEMORY = ErrorDetails(code="gpu_out_of_memory", message="24 GB are not enough.", retryable=False, node="4")


def test_a_stop_shows_its_reason_or_that_the_task_was_cancelled() -> None:
    assert str(TaskStopped("no longer wanted")) == "no longer wanted"
    assert str(TaskStopped("")) == "The task was cancelled."
    assert str(RowEnded()) == "The task had ended before this run was reset."


def test_a_failure_without_details_has_its_own() -> None:
    failed = TaskFailed(FailureCode.TIMEOUT, "The job did not end.")

    assert (failed.code, str(failed)) == (FailureCode.TIMEOUT, "The job did not end.")
    assert failed.error_details == ErrorDetails(code="timeout", message="The job did not end.", retryable=False)


@pytest.mark.parametrize(
    ("details", "code", "sentence"),
    [
        (OUT_OF_MEMORY, FailureCode.GPU_OUT_OF_MEMORY, "24 GB are not enough."),
        (ErrorDetails(code="flooded", message="", retryable=True), FailureCode.INTERNAL, "The job ended with flooded."),
        (ErrorDetails(code="quota_exceeded", message="No.", retryable=False), FailureCode.INTERNAL, "No."),
        (ErrorDetails(code="reply_invalid", message="No JSON."), FailureCode.REPLY_INVALID, "No JSON."),
    ],
    ids=["a job's code", "an unknown code", "a code that is no job's", "a job that cannot be read"],
)
def test_a_job_that_failed_ends_the_task_with_its_code(details: ErrorDetails, code: FailureCode, sentence: str) -> None:
    failed = TaskFailed.by_job(details)

    assert (failed.code, str(failed), failed.error_details) == (code, sentence, details)


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ErrorDetails(code="quota_exceeded", message="No."), FailureCode.QUOTA_EXCEEDED, "No."),
        (ErrorDetails(code="flooded", message=""), FailureCode.INTERNAL, "The task had failed with flooded."),
        (None, FailureCode.INTERNAL, "The task had failed with internal."),
    ],
    ids=["our own code", "an unknown code", "no error"],
)
def test_a_failed_row_ends_the_run_with_its_code(error: ErrorDetails | None, code: FailureCode, sentence: str) -> None:
    failed = TaskFailed.by_row(error)

    assert (failed.code, str(failed), failed.error_details) == (code, sentence, error or ErrorDetails())


def test_a_refusal_ends_the_task_with_its_code_and_a_refused_job_with_the_jobs_own() -> None:
    refusal = Refusal(code=FailureCode.INPUT_INVALID, message="job_refused", http_status=422, sentence="Refused.")

    plain = TaskFailed.by_refusal(refusal)
    of_a_job = TaskFailed.by_refusal(refusal.model_copy(update={"error_details": OUT_OF_MEMORY}))

    assert (plain.code, str(plain)) == (FailureCode.INPUT_INVALID, "Refused.")
    assert (of_a_job.code, of_a_job.error_details) == (FailureCode.GPU_OUT_OF_MEMORY, OUT_OF_MEMORY)


def activity_error(cause: BaseException | None) -> ActivityError:
    error = ActivityError(
        "Activity task failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="worker",
        activity_type="estimate",
        activity_id="1",
        retry_state=RetryState.TIMEOUT,
    )
    error.__cause__ = cause
    return error


def timed_out(after: BaseException | None) -> TimeoutError:
    error = TimeoutError("activity timed out", type=TimeoutType.SCHEDULE_TO_CLOSE, last_heartbeat_details=[])
    error.__cause__ = after
    return error


def test_an_activity_that_gave_up_fails_with_what_its_last_attempt_said() -> None:
    said = ApplicationError("credits did not answer: HTTP 502.", type="reply_invalid")

    for error in (said, activity_error(said), activity_error(timed_out(said))):
        failed = failure_from(error, UNAVAILABLE)
        assert (failed.code, str(failed)) == (
            FailureCode.REPLY_INVALID,
            "credits did not answer: HTTP 502.",
        )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (activity_error(timed_out(None)), "activity timed out"),
        (activity_error(ApplicationError("out of disk", type="OSError")), "out of disk"),
        (activity_error(None), "Activity task failed"),
        (timed_out(None), "activity timed out"),
    ],
    ids=["timed out", "another failure", "no cause", "no activity"],
)
def test_an_activity_that_says_no_code_of_ours_was_not_answered(error: ActivityError | TimeoutError, said: str) -> None:
    failed = failure_from(error, UNAVAILABLE)

    assert failed.code is UNAVAILABLE
    assert str(failed).startswith("The call got no answer in time (")
    assert said in str(failed)
