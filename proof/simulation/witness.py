"""What a run received and what it requested: by Temporal's history and the services, never by the run itself."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.comfyui import Checkpoint, JobState, TrainingState
from comfyui_temporal.contracts.errors import Answer, ErrorDetails, FailureCode
from comfyui_temporal.contracts.lives import READ_THE_LEDGER, TASK_ENDED
from comfyui_temporal.contracts.tasks import ConfirmPrice
from proof.simulation.calls import Call
from proof.simulation.comfyui_model import id_of
from proof.simulation.hosted_run import CONVERTER
from proof.simulation.sdk import WorkflowActivationJob

State = JobState | TrainingState
SUBMITS = frozenset({"submit_job", "create_training"})
GETS = frozenset({"get_job", "get_training"})
CANCELS = frozenset({"cancel_job", "cancel_training"})
LOST_AFTER = 10.0
OURS = frozenset({TASK_ENDED, READ_THE_LEDGER})
"""Refusals of our own: the call was not made."""


@dataclass(frozen=True)
class Report:
    """A job's state as the run received it, by a callback or an answer."""

    at: float
    state: State
    is_polled: bool = False

    @property
    def error(self) -> ErrorDetails | None:
        return self.state.error_details if isinstance(self.state, JobState) else self.state.failure()

    @property
    def is_queued(self) -> bool:
        """Whether the job waits: one that failed in the queue does so no longer."""
        if self.error is not None:
            return False
        status = self.state.job_status if isinstance(self.state, JobState) else self.state.training_status
        return str(status) == "queued"

    @property
    def checkpoint(self) -> Checkpoint | None:
        return self.state.checkpoint if isinstance(self.state, TrainingState) else None


@dataclass
class Attempt:
    """One job that was requested. `call` is its first request."""

    n: int
    call: Call
    job_id: str | None = None
    accepted: Any = None
    accepted_at: float = 0.0

    @property
    def was_answered_at_once(self) -> bool:
        """Whether the first request was answered, not only its repeat for the undo."""
        return self.accepted is not None and self.call.outcome is not None


def number_of(key: str) -> int:
    """The `n` of an idempotency key; −1 for a key without one, which no call of ours has."""
    n = key.rpartition(":")[2]
    return int(n) if n.isdigit() else -1


def key_of(call: Call) -> str:
    return str(getattr(call.argument, "key", None) or "")


class Witness:
    """Keeps what was recorded: calls by name, reports by job, in the order in which they arrived."""

    def __init__(self) -> None:
        self.sent: dict[bytes, State] = {}
        """Every callback that was sent → the state in it."""
        self.calls: dict[str, list[Call]] = defaultdict(list)
        self.attempts: dict[int, Attempt] = {}
        self.reports: dict[str, list[Report]] = defaultdict(list)
        self.unknown_at: dict[str, list[float]] = defaultdict(list)
        """Job → when its server said that it does not know it."""
        self.signal_bytes: defaultdict[float, int] = defaultdict(int)
        """When → the bytes of all signals that arrived then."""
        self.confirmed: dict[float, int] = {}
        """The payer's confirmations: when, and how many points."""
        self.began_at: list[float] = []
        """When each run of the task took its first step."""
        self.continued_at: set[float] = set()
        """When a run continued as new: what it learned in that step only the next run can act on."""

    # As the server records it

    def received(self, job: WorkflowActivationJob, at: float) -> None:
        if job.HasField("signal_workflow"):
            inputs = job.signal_workflow.input
            self.signal_bytes[at] += sum(len(given.data) for given in inputs)
            state = self.sent.get(inputs[0].data) if len(inputs) == 1 else None
            if state is not None:
                self._report(state, at)
        elif job.HasField("initialize_workflow"):
            self.began_at.append(at)
        elif job.HasField("do_update") and job.do_update.id.startswith("confirm"):
            [request] = CONVERTER.from_payloads(list(job.do_update.input), [ConfirmPrice])
            self.confirmed[at] = max(request.max_credits, self.confirmed.get(at, 0))

    def scheduled(self, call: Call, at: float) -> None:
        call.scheduled_at = at
        self.calls[call.name].append(call)
        if call.name in SUBMITS:
            n = number_of(key_of(call))
            self.attempts.setdefault(n, Attempt(n, call))

    def resolved(self, call: Call, at: float) -> None:
        call.resolved_at = at
        answer = call.outcome
        if not isinstance(answer, Answer):
            return
        if call.name in SUBMITS and answer.reply is not None:
            attempt = self.attempts[number_of(key_of(call))]
            if attempt.accepted is None:
                attempt.accepted, attempt.accepted_at = answer.reply, at
                attempt.job_id = getattr(answer.reply, "job_id", None) or answer.reply.training_id
        elif call.name in GETS and call.cancel_asked_at is None:
            assert isinstance(call.argument, JobCall)
            if answer.reply is not None:
                self._report(answer.reply, at, is_polled=True)
            elif answer.refusal is not None and answer.refusal.code is FailureCode.LOST:
                self.unknown_at[call.argument.job_id].append(at)

    def _report(self, state: State, at: float, *, is_polled: bool = False) -> None:
        self.reports[id_of(state)].append(Report(at, state, is_polled))

    # Conclusions

    def was_accepted(self, attempt: Attempt) -> bool:
        """Whether the run received the job's acceptance before it began to undo it."""
        return any(
            call.resolved_at is not None and isinstance(call.outcome, Answer) and call.outcome.reply is not None
            for name in SUBMITS
            for call in self.calls.get(name, ())
            if number_of(key_of(call)) == attempt.n and not call.argument.is_undo
        )

    @property
    def attempt(self) -> Attempt | None:
        """The newest job that was requested."""
        return self.attempts[max(self.attempts)] if self.attempts else None

    def reports_of(self, job_id: str | None) -> list[Report]:
        """The reports that count: each with a higher sequence than those before, up to the job's last."""
        lost_at = self.lost_at(job_id)
        reports = self.reports.get(job_id or "", [])
        return _new(reports if lost_at is None else [report for report in reports if report.at < lost_at])

    def acted_on_from(self, report: Report) -> float:
        """The first moment at which the task could act on a report."""
        if report.at not in self.continued_at:
            return report.at
        return min((at for at in self.began_at if at > report.at), default=float("inf"))

    def lost_at(self, job_id: str | None) -> float | None:
        """When the server had said twice, and far enough apart, that it does not know the job.

        An answer in between shows that it knows the job, also one without news; so does a callback with news.
        """
        unknown = self.unknown_at.get(job_id or "")
        if not unknown:
            return None
        since: float | None = None
        reports = self.reports.get(job_id or "", [])
        known = [report.at for report in [*_new(reports), *(report for report in reports if report.is_polled)]]
        for at in unknown:
            if since is None or any(since < known_at <= at for known_at in known):
                since = at
            elif at - since >= LOST_AFTER:
                return at
        return None

    def first(self, name: str, n: int) -> Call | None:
        """The first request of a step's `n`-th call."""
        return next((call for call in self.calls.get(name, ()) if number_of(key_of(call)) == n), None)

    def last(self, name: str, n: int) -> Call | None:
        """The last request of a step's `n`-th call."""
        return next((call for call in reversed(self.calls.get(name, ())) if number_of(key_of(call)) == n), None)

    def reply(self, name: str, n: int) -> Any:
        """The reply to a step's `n`-th call that the run received, or None."""
        for call in self.calls.get(name, ()):
            reply = call.outcome.reply if isinstance(call.outcome, Answer) and call.resolved_at is not None else None
            if reply is not None and number_of(key_of(call)) == n:
                return reply
        return None

    def refusals(self, *names: str) -> list[tuple[float, str]]:
        """When the run received a definite refusal, and the refusal's message."""
        resolved_calls = [call for name in names for call in self.calls.get(name, ()) if call.resolved_at is not None]
        return [
            (call.resolved_at or 0.0, call.outcome.refusal.message)
            for call in resolved_calls
            if isinstance(call.outcome, Answer) and call.outcome.refusal is not None
            if call.outcome.refusal.message not in OURS
        ]

    def is_open(self, name: str, since: float) -> bool:
        """Whether a call of that name was open at some time after `since`."""
        return any(call.resolved_at is None or call.resolved_at >= since for call in self.calls.get(name, ()))


def _new(reports: list[Report]) -> list[Report]:
    """Those with a higher sequence than any before, up to the job's last."""
    news: list[Report] = []
    for report in reports:
        if not news or report.state.sequence > news[-1].state.sequence:
            news.append(report)
            if report.state.has_ended():
                break
    return news
