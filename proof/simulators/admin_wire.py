"""Bodies of the admin routes of both simulators, shared by the services and `admin_client.py`."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator


class FaultKind(StrEnum):
    """The kinds of fault; docs/simulators.md says what each does and which parameters it reads."""

    # At the edge: any route of either service.
    DROP = "drop"
    DELAY = "delay"
    ACT_LATE = "act_late"
    ERROR = "error"
    RATE_LIMIT = "rate_limit"
    HTML = "html"
    GARBAGE = "garbage"
    ANSWER = "answer"
    ALTER = "alter"
    NOT_OFFERED = "not_offered"
    IGNORE_KEYS = "ignore_keys"
    # Callbacks.
    CALLBACK_WITHHOLD = "callback_withhold"
    CALLBACK_DUPLICATE = "callback_duplicate"
    CALLBACK_REORDER = "callback_reorder"
    CALLBACK_LATE = "callback_late"
    CALLBACK_GARBAGE = "callback_garbage"
    CALLBACK_FORGE = "callback_forge"
    # Jobs and trainings, decided when they are submitted or created.
    JOB_REFUSE = "job_refuse"
    JOB_FAIL = "job_fail"
    JOB_PREEMPT = "job_preempt"
    JOB_STALL = "job_stall"
    JOB_SLOW = "job_slow"
    JOB_FORGET = "job_forget"
    JOB_INSTANT = "job_instant"
    JOB_DURATION = "job_duration"
    JOB_GPU_HOURS = "job_gpu_hours"
    JOB_LIE = "job_lie"
    # Credits.
    LEDGER_LAG = "ledger_lag"
    PLAIN_LEDGER = "plain_ledger"


EDGE_KINDS: Final = frozenset(
    {
        FaultKind.DROP,
        FaultKind.DELAY,
        FaultKind.ACT_LATE,
        FaultKind.ERROR,
        FaultKind.RATE_LIMIT,
        FaultKind.HTML,
        FaultKind.GARBAGE,
        FaultKind.ANSWER,
        FaultKind.ALTER,
        FaultKind.NOT_OFFERED,
    }
)
CALLBACK_KINDS: Final = frozenset(kind for kind in FaultKind if kind.startswith("callback_"))
JOB_KINDS: Final = frozenset(kind for kind in FaultKind if kind.startswith("job_"))


STANDING_KINDS: Final = frozenset(
    {FaultKind.NOT_OFFERED, FaultKind.IGNORE_KEYS, FaultKind.LEDGER_LAG, FaultKind.PLAIN_LEDGER}
)
"""Properties of a service rather than single faults: without end unless `times` is given."""


class AdminModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Match(AdminModel):
    """Which occasions a fault hits; a null field matches anything.

    `route` is a route's name (`submit_job`, `pre_deduct` …). `callback_status` is the `job_status` or
    `training_status` in a callback. `nth` counts from 1 over the occasions that match otherwise, from when
    the fault was set.
    `probability` is decided by `seed`, route, task and how often that pair came, so that a run can be repeated.
    `times`: how many hits the fault has; null is without end. Default: 1, without end for `STANDING_KINDS`.
    """

    route: str | None = None
    method: Literal["GET", "POST"] | None = None
    task_id: str | None = None
    tenant_id: str | None = None
    callback_status: str | None = None
    nth: int | None = Field(default=None, ge=1)
    probability: float | None = Field(default=None, ge=0, le=1)
    seed: int = 0
    times: int | None = Field(default=1, ge=1)


class Parameters(AdminModel):
    """Each kind reads its own of these; docs/simulators.md lists them."""

    when: Literal["before", "after"] | None = None
    """Whether the service acts first. Default: `after` for `drop` and `alter`, `before` for the others."""
    seconds: float | None = Field(default=None, ge=0)
    status: int | None = Field(default=None, ge=100, le=599)
    body: Any = None
    headers: dict[str, str] = {}
    fields: dict[str, Any] = {}
    """What overlays the JSON answer (`alter`) or the job's state (`job_lie`)."""
    reply: dict[str, Any] = {}
    """`job_lie`: what overlays the 202."""
    code: str = "internal"
    message: str = "A test made this job fail."
    retryable: bool = False
    node: str | None = None
    as_text: bool = False
    """`job_fail`: `error_details` is the message alone, as contract §1 allows."""
    at: float = Field(default=0.5, ge=0, le=1)
    """How far the work is when it happens, 0 to 1."""
    while_queued: bool = False
    """It happens before the job gets a GPU, instead of `at`."""
    factor: float = Field(default=4.0, gt=0)
    copies: int = Field(default=1, ge=1, le=1000)
    same_id: bool = True
    instead: bool = False
    """Garbage and forged callbacks: sent instead of the genuine one, not in addition to it."""
    gpu_hours: float | None = Field(default=None, ge=0)


class FaultOrder(AdminModel):
    """Body of `POST /admin/faults`."""

    kind: FaultKind
    match: Match = Match()
    parameters: Parameters = Parameters()

    @model_validator(mode="after")
    def _standing(self) -> Self:
        if self.kind in STANDING_KINDS and "times" not in self.match.model_fields_set:
            self.match = self.match.model_copy(update={"times": None})
        return self


class Fault(FaultOrder):
    """A fault that is set: `seen` occasions matched, `hits` were hit."""

    fault_id: int
    seen: int = 0
    hits: int = 0


class Schedule(AdminModel):
    """Body of `POST /admin/schedule`: each kind gets `rate` / number of kinds as its probability."""

    seed: int
    rate: float = Field(ge=0, le=1)
    kinds: list[FaultKind] = Field(min_length=1)
    route: str | None = None
    parameters: Parameters = Parameters(seconds=0.2)


class ClockOrder(AdminModel):
    """Body of `POST /admin/clock`."""

    advance_seconds: float = Field(default=0, ge=0)
    speed: float | None = Field(default=None, gt=0)


class ClockSeen(AdminModel):
    now: AwareDatetime
    work_seconds: float
    speed: float


class RequestSeen(AdminModel):
    """One request. `outcome`: acted, repeated (answered from its key), refused, not_acted; `faults` that hit it."""

    at: AwareDatetime
    route: str
    method: str
    path: str
    key: str | None
    tenant_id: str | None
    task_id: str | None
    body_sha256: str
    status: int | None
    outcome: Literal["acted", "repeated", "refused", "not_acted"]
    faults: list[FaultKind]


class RunSeen(AdminModel):
    """One job or training. `state` is what GET answers (without log)."""

    run_id: str
    kind: Literal["image", "training"]
    task_id: str
    tenant_id: str
    user_id: str
    phase: Literal["idle", "waiting", "working", "over", "forgotten"]
    holds_gpu: bool
    pool: str
    state: dict[str, Any]

    @property
    def is_over(self) -> bool:
        """Neither running nor able to run again."""
        return self.phase in ("over", "forgotten")


class RunAction(StrEnum):
    FAIL = "fail"
    PREEMPT = "preempt"
    STALL = "stall"
    RESUME = "resume"
    FORGET = "forget"
    FINISH = "finish"
    LIE = "lie"
    GPU_HOURS = "gpu_hours"


class RunOrder(AdminModel):
    """Body of `POST /admin/jobs/{run_id}`: what happens to it now."""

    action: RunAction
    parameters: Parameters = Parameters()


class GpuOrder(AdminModel):
    """Body of `PUT /admin/gpus/{gpu_type}`: how many there are."""

    total: int = Field(ge=0)


class CallbackSeen(AdminModel):
    """One callback in the outbox."""

    callback_id: int
    webhook_id: str
    run_id: str
    task_id: str
    kind: Literal["true", "duplicate", "garbage", "forged"]
    phase: Literal["pending", "delivered", "refused", "given_up", "withheld"]
    attempts: int
    last_status: int | None
    due_at: AwareDatetime
    body: str


class AccountSeen(AdminModel):
    tenant_id: str
    user_id: str
    balance: int
    frozen: int


class HoldSeen(AdminModel):
    pre_deduct_id: str
    tenant_id: str
    user_id: str
    task_id: str
    template_id: str
    amount: int
    expire_at: AwareDatetime
    phase: Literal["open", "committed", "cancelled", "expired"]


class EntrySeen(AdminModel):
    """One ledger entry, whole; `frozen_after` and `user_id` are not on the wire."""

    ledger_id: str
    tenant_id: str
    user_id: str
    task_id: str | None
    kind: Literal["grant", "pre_deduct", "commit", "cancel", "expire", "charge"]
    change: int
    frozen_change: int
    balance_after: int
    frozen_after: int
    reason: str
    created_at: AwareDatetime
    pre_deduct_id: str | None


class AccountOrder(AdminModel):
    """Body of `PUT /admin/accounts/{tenant_id}/{user_id}`; the account is made where it is missing."""

    balance: int = Field(ge=0)


class AuthorizationOrder(AdminModel):
    """Body of `PUT /admin/authorizations/{tenant_id}/{template_id}`. `quota`: holds, −1 is none."""

    phase: Literal["granted", "revoked", "missing"] = "granted"
    expires_at: AwareDatetime | None = None
    quota: int = Field(default=-1, ge=-1)


class BalanceCheck(AdminModel):
    """Whether the ledger is consistent; `problems` has one sentence for each contradiction."""

    ok: bool
    accounts: int
    entries: int
    open_holds: int
    problems: list[str]
