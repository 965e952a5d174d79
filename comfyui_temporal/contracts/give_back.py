"""The give-back for a run that ended without its own clean-up (contract §7 rollback)."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, model_validator

from comfyui_temporal.contracts.calls import Post, SnapshotOrder, number_in
from comfyui_temporal.contracts.comfyui import TrainingOutput
from comfyui_temporal.contracts.credits import ChargeRequest
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.fields import CallerId, CallerText, OwnModel
from comfyui_temporal.contracts.handed_on import KeptModel, Order
from comfyui_temporal.contracts.requests import HoldState, RequestedHold, RequestedJob
from comfyui_temporal.contracts.task_store import TaskRow
from comfyui_temporal.contracts.tasks import CreditsSummary, TaskResult, TaskStatus

GIVE_BACK_WORKFLOW: Final = "GiveBackWorkflow"
_NOTHING: Final[tuple[Any, ...]] = (None, [], {}, "", 0, False)
GIVE_BACK_PREFIX: Final = "give-back-"


def give_back_id_of(task_id: str) -> str:
    """The only workflow id of a task's give-back."""
    return GIVE_BACK_PREFIX + task_id


class GiveBackOrder(KeptModel):
    """Which task is given back, and the reason in the request."""

    task_id: CallerId
    reason: Annotated[CallerText, Field(max_length=500)] = ""


class GiveBackRun(GiveBackOrder, Order):
    """Argument of `GiveBackWorkflow`."""

    model_config = Order.model_config


class OwnEnd(KeptModel):
    """How a run ended by itself. Its row can still be open if the store was restored from an older backup."""

    status: TaskStatus
    code: FailureCode | None = None
    message: str = ""
    result_urls: list[str] = []
    output: TrainingOutput | None = None

    @classmethod
    def of(cls, result: TaskResult) -> OwnEnd:
        """The end in a run's own result, and the results that it delivered."""
        fields = ("status", "result_urls", "output")
        return cls(**{name: getattr(result, name) for name in fields if hasattr(result, name)})


class Orphans(KeptModel):
    """What an ended run left behind, by its history and the task's row.

    A field that only a newer worker knows may be about money: such a document is rejected here and waits for a worker
    that knows the field.
    """

    row: TaskRow
    how: str
    """How the run ended: `terminated`, `timed_out`, `failed`, `vanished` …"""
    holds: list[RequestedHold] = []
    holds_before: int = 0
    """How many more were granted; they are over."""
    jobs: list[RequestedJob] = []
    charges: list[Post[ChargeRequest]] = []
    """Requested after delivery, if the hold had ended."""
    charges_before: int = 0
    """How many charges runs before a reset had sent, none of which is in `charges`."""
    price_before: int | None = None
    """The price that runs before a reset had requested, where this one requested none: what they did not charge of it
    is the task's shortfall, and nothing more is charged."""
    charge_refused: bool = False
    """The last of `charges` was refused: nothing more is charged."""
    asked_again: int = 0
    """How many of the holds were requested more than once."""
    cost: int | None = None
    """The price of the delivered work in points, or what of it was to be committed, where an older worker requested
    that; None if neither a commit nor a charge with a price had been requested."""
    commit_of: str | None = None
    """The hold that was to be committed last."""
    snapshot: SnapshotOrder | None = None
    """The copy of the dataset that must be deleted. The order names no files."""
    own_end: OwnEnd | None = None
    """How the run ended by itself; None if it did not, or had not begun anything."""

    @property
    def charges_sent(self) -> int:
        """The number of the last charge that the run sent and that was not refused."""
        sent = self.charges[:-1] if self.charge_refused else self.charges
        return max((number_in(post.key) for post in sent), default=0)

    def hold_state(self) -> HoldState:
        """The holds in the form that a run keeps."""
        return HoldState(
            asked=self.holds,
            granted_before=self.holds_before,
            estimated=self.row.credits.estimated,
            asked_again=self.asked_again,
        )

    def take_holds(self, state: HoldState) -> None:
        """Take over the holds that were read."""
        self.holds, self.holds_before = state.asked, state.granted_before
        self.asked_again = state.asked_again

    @model_validator(mode="before")
    @classmethod
    def _known_as_a_whole(cls, found: Any) -> Any:
        if isinstance(found, dict):
            unknown = [name for name in found if name not in cls.model_fields and found[name] not in _NOTHING]
            if unknown:
                raise ValueError(f"a newer worker found {', '.join(unknown)}, which this one cannot give back")
        return found


class EarlierJobs(KeptModel):
    """What earlier lives of a task requested: jobs without an answer, and charges of a price."""

    jobs: list[RequestedJob] = []
    """Each with its body, so that the request can be repeated."""
    charges: int = 0
    """How many charges they sent that were not refused. A ledger that lags may not show them yet."""
    price: int | None = None
    """The price of the delivered work in points, as their newest commit or charge named it; None where none did, and
    from an older worker."""
    unread: list[str] = []
    """Sentences about what could not be read."""


class EarlierRunsRead(KeptModel):
    """How far an attempt has read a task's earlier runs, newest first: the next attempt goes on from there."""

    run_ids: list[str] = []
    made: list[RequestedJob] = []
    """Jobs with their ids, each without its body. Of a key that made one, no other request is open."""
    found: EarlierJobs = EarlierJobs()
    """Its jobs have no answer in any of these runs."""


GiveBackOutcome = Literal["given_back", "already_charged", "nothing_held", "settlement_unknown"]


class GiveBackResult(OwnModel):
    """Result of `GiveBackWorkflow`.

    `given_back`: hold and job are given back and the task has failed. `already_charged`: it had been charged, and is
    completed. `nothing_held`: it had ended and given back everything itself. `settlement_unknown`: it is unknown
    whether it was charged; the reconciler reads the ledger again.
    """

    task_id: str
    outcome: GiveBackOutcome
    credits: CreditsSummary


def outcome_of(credits: CreditsSummary, if_not_charged: GiveBackOutcome) -> GiveBackOutcome:
    """The outcome of a give-back, by an ended task's credits."""
    if credits.charged is None:
        return "settlement_unknown"
    return "already_charged" if credits.charged else if_not_charged
