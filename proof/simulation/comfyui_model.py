"""ComfyUI, exactly by contract §2 and §3: what image jobs and trainings have in common."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Generic, TypeVar

from comfyui_temporal.contracts.calls import JobCall, Post
from comfyui_temporal.contracts.comfyui import JobState, TrainingState
from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, Answer, ErrorDetails, FailureCode, Refusal
from comfyui_temporal.contracts.fields import OwnModel
from proof.simulation.timeline import Timeline

_ROWS: Final = {row.message: row for row in COMFYUI_ERRORS}
State = TypeVar("State", JobState, TrainingState)
Request = TypeVar("Request", bound=OwnModel)


def refused(message: str) -> Answer[Any]:
    """A definite refusal by contract §2's table."""
    row = _ROWS[message]
    return Answer(
        refusal=Refusal(
            code=row.failure, message=message, http_status=404, wire_code=row.code, sentence=f"Refused: {message}."
        )
    )


def id_of(state: JobState | TrainingState) -> str:
    return state.job_id if isinstance(state, JobState) else state.training_id


def error_of(state: JobState | TrainingState) -> ErrorDetails | None:
    """How it has failed, or None."""
    return state.error_details if isinstance(state, JobState) else state.failure()


@dataclass
class Work(Generic[State]):
    """One job or training; `state` is what GET shows."""

    state: State
    request: Any
    asked_at: float
    key: str = ""
    price: int = 0
    """An image's `estimated_cost` in points."""
    is_started: bool = True
    is_forgotten: bool = False
    is_cancelled: bool = False

    @property
    def is_over(self) -> bool:
        return self.state.has_ended()

    @property
    def runs(self) -> bool:
        """Whether it uses, or may yet use, a GPU."""
        return not self.is_over and not self.is_forgotten


@dataclass
class ComfyUITerms:
    """How this server is set up. `not_offered`: names of (ours) routes that it lacks."""

    not_offered: frozenset[str] = frozenset()
    refuses_submits_with: str | None = None
    minutes: float = 2.0
    """Its `estimated_time`."""
    sends_callbacks: bool = True
    flickers: Flicker | None = None
    """How it answers `get` for `flickers_for` seconds after the first 404, which is its `flickers_at`th answer."""
    flickers_at: int = 1
    flickers_for: float = 0.0


class Flicker(StrEnum):
    """What a server answers to `get` once it has answered that it does not know a job that it has."""

    KNOWN = "known"
    UNREADABLE = "unreadable"
    REFUSED = "authorization_missing"


class UnreadableAnswer(Exception):
    """The server's answer cannot be read."""


class ComfyUIModel(Generic[State]):
    """Jobs of one kind. Every change raises `sequence` and may be sent as a callback."""

    def __init__(
        self, timeline: Timeline, rng: random.Random, terms: ComfyUITerms, call_back: Callable[[Work[Any]], None]
    ) -> None:
        self._timeline = timeline
        self._rng = rng
        self.terms = terms
        self._call_back = call_back
        self.works: dict[str, Work[State]] = {}
        self.published: dict[tuple[str, int], State] = {}
        """Job and sequence → the state that it had."""
        self._answers: dict[str, tuple[str, Answer[Any]]] = {}
        self.conflicts: list[str] = []
        self._gets = 0
        self._flickers_until: float | None = None

    def submit(self, post: Post[Any]) -> Answer[Any]:
        return self._once(post.key, post.body.model_dump_json(), lambda: self._made(post))

    def get(self, call: JobCall) -> Answer[State]:
        work = self.works.get(call.job_id)
        if work is None or work.is_forgotten:
            return self._unknown()
        return self._flickering() or Answer(reply=work.state)

    def _flickering(self) -> Answer[Any] | None:
        """The answer in the state's place. Raises UnreadableAnswer."""
        self._gets += 1
        if self.terms.flickers is None:
            return None
        if self._flickers_until is None:
            if self._gets < self.terms.flickers_at:
                return None
            self._flickers_until = self._timeline.now + self.terms.flickers_for
            return self._unknown()
        if self.terms.flickers is Flicker.KNOWN or self._timeline.now >= self._flickers_until:
            return None
        if self.terms.flickers is Flicker.UNREADABLE:
            raise UnreadableAnswer
        return refused(self.terms.flickers.value)

    def cancel(self, call: JobCall) -> Answer[State]:
        if "cancel" in self.terms.not_offered:
            return Answer(not_offered=True)
        assert call.key is not None
        return self._once(call.key, call.job_id, lambda: self._cancelled(call.job_id))

    def failures_of(self, job_id: str | None) -> set[str]:
        """All codes with which a job reported a failure."""
        errors = [error_of(state) for (published_id, _), state in self.published.items() if published_id == job_id]
        return {error.code for error in errors if error is not None}

    def has_failed(self, job_id: str | None) -> bool:
        """Whether a job failed, or is no longer known."""
        work = self.works.get(job_id or "")
        return bool(self.failures_of(job_id)) or (work is not None and work.is_forgotten)

    # What each kind of work defines

    @abstractmethod
    def _made(self, post: Post[Any]) -> Answer[Any]:
        """Begin a new piece of work, or refuse."""

    @abstractmethod
    def _unknown(self) -> Answer[Any]:
        """404."""

    # Shared

    def _once(self, key: str, body: str, act: Callable[[], Answer[Any]]) -> Answer[Any]:
        known = self._answers.get(key)
        if known is None:
            self._answers[key] = known = (body, act())
        elif known[0] != body:
            self.conflicts.append(key)
            return refused("idempotency_conflict")
        return known[1]

    def _cancelled(self, job_id: str) -> Answer[State]:
        work = self.works.get(job_id)
        if work is None or work.is_forgotten:
            return self._unknown()
        if not work.is_over:
            work.is_cancelled = True
            self.change(work, error_details=ErrorDetails(code=FailureCode.CANCELLED, message="cancelled"))
        return Answer(reply=work.state)

    def change(self, work: Work[State], **fields: Any) -> None:
        """Change the work's state; a callback reports it where the server sends them."""
        work.state = state = work.state.model_copy(update={**fields, "sequence": work.state.sequence + 1})
        self.published[id_of(state), state.sequence] = state
        if self.terms.sends_callbacks:
            self._call_back(work)

    def forget(self, work: Work[State]) -> None:
        work.is_forgotten = True

    def live(self, work: Work[State], plan: list[tuple[float, Callable[[], None]]]) -> None:
        """Run the work: each change after its seconds, unless the work has ended or was forgotten."""
        if not plan:
            return
        (seconds, change), rest = plan[0], plan[1:]

        def happen() -> None:
            if not work.is_over and not work.is_forgotten:
                change()
                self.live(work, rest)

        self._timeline.after(seconds, happen)
