"""The task store as workflows call it: the claim of an id, facts, and what a run may have forgotten.

A local try must not wait long for a hanging PostgreSQL: it occupies one of few slots, and its workflow receives
nothing meanwhile (decision 3). So after a failure local tries fail immediately for a while. The visible activity finds
out whether PostgreSQL is back; it occupies no scarce slot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities import metrics
from activities.lives import acting_run, current
from activities.running_call import request_limit_seconds, uninterrupted
from activities.task_story import TaskStory
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.lives import EarlierLife
from comfyui_temporal.contracts.policy import Policy
from comfyui_temporal.contracts.task_store import (
    ClaimOutcome,
    Heard,
    HeardOrder,
    LookOrder,
    RowSeen,
    TaskClaim,
    TaskWrite,
    TrainedModel,
)
from comfyui_temporal.contracts.tenant_limits import NO_LIMITS, TenantLimits
from comfyui_temporal.encryption import NO_ENCRYPTION, PayloadEncryption
from store import (
    NotTheClaimant,
    StartRefused,
    StoredInput,
    StoreFailure,
    StoreUnavailable,
    TaskStore,
    TaskUnknown,
    WriteRefused,
)

T = TypeVar("T")

TRY_SECONDS: Final = 2.0
"""Limit of one try: longer than the statement timeout, shorter than a local try's time."""
BREAK_SECONDS: Final = 5.0
"""After PostgreSQL could not be used, local tries fail immediately for this long."""


class LocalBreaker:
    """A circuit breaker: after a failure it blocks local tries for `BREAK_SECONDS`, then lets one through as a probe.

    Visible activities always go through. Any success closes the breaker.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open_until = 0.0

    def lets_through(self) -> bool:
        """Whether a local try may run now. The first after the pause is the probe; the others wait for its result."""
        now = self._clock()
        if now < self._open_until:
            return False
        if self._open_until:
            self._open_until = now + BREAK_SECONDS
        return True

    def failed(self) -> None:
        self._open_until = self._clock() + BREAK_SECONDS

    def succeeded(self) -> None:
        self._open_until = 0.0


class TaskStoreActivities:
    """Claim, write, look. A write may be repeated and may land late: facts have keys (contract §6)."""

    def __init__(
        self,
        store: TaskStore,
        policy_of: Callable[[TaskClaim], Policy],
        encryption: PayloadEncryption = NO_ENCRYPTION,
        limits_of: Callable[[str], TenantLimits] = lambda _tenant_id: NO_LIMITS,
        *,
        keeps_inputs: bool = True,
    ) -> None:
        """`policy_of` reads the worker's settings: prices and limits are not part of the input (contract §5).

        `limits_of` gives a tenant's limits, for starts that reach Temporal past the gateway.
        `keeps_inputs`: whether what was asked for is stored, encrypted where `encryption` encrypts.
        """
        self._limits_of = limits_of
        self._store = store
        self._encryption = encryption
        self._policy_of = policy_of
        self._keeps_inputs = keeps_inputs
        self._breaker = LocalBreaker()
        self._story = TaskStory()

    @activity.defn
    async def claim(self, claim: TaskClaim) -> ClaimOutcome:
        """Claim the task id for the run (contract §8) and read the policy. Raises ApplicationError, retryable."""
        run = acting_run(claim.task_id, claim.first_execution_run_id, 0)
        stored = self._with_stored_hash(claim)
        policy, limits = self._policy_of(claim), self._limits_of(claim.tenant_id)
        try:
            claimed = await self._tried(
                self._store.claim(stored, run, limits=limits, given=self._input_of(claim), within_seconds=self._limit())
            )
        except StartRefused as refused:
            self._breaker.succeeded()
            return ClaimOutcome(claimed=False, policy=policy, refused=str(refused))
        self._story.claimed(claim, is_ours=claimed)
        life = EarlierLife()
        if claimed and run is not None:
            life = await self._tried(self._store.register(run, within_seconds=self._limit()))
        models: list[TrainedModel] = []
        if claimed and claim.model_ids:
            models = await self._tried(
                self._store.models(claim.tenant_id, claim.model_ids, within_seconds=self._limit())
            )
        return ClaimOutcome(
            claimed=claimed,
            policy=policy,
            earlier_life=life if life.is_possible else None,
            input_sha256=stored.input_sha256 if self._encryption.encrypts else None,
            models=models,
        )

    @activity.defn
    async def write(self, write: TaskWrite) -> None:
        """Write row, events and exception records. Raises ApplicationError.

        Type `task_exists`, not retried: another run holds the id. `internal`, not retried: the store has no such
        task, or rejects the values. `internal`, retried: PostgreSQL cannot be used now.
        """
        run = acting_run(write.task_id, write.first_execution_run_id, write.run_number)
        if write.claim is not None:
            write = write.model_copy(update={"claim": self._with_stored_hash(write.claim)})
        metrics.observe_write_lag(write.facts)
        written = await self._tried(self._store.write(write, run, within_seconds=self._limit()))
        if written is None and run is not None and (again := await current(run)) is not None:
            written = await self._tried(self._store.write(write, again, within_seconds=self._limit()))
        self._story.written(write)
        if written is not None and written.ended:
            metrics.count_end(written.scene, write.state)

    @activity.defn
    async def look(self, order: LookOrder) -> RowSeen:
        """What the task's row knows beyond the calling run. Raises ApplicationError `internal`, retried."""
        run = acting_run(order.task_id, order.first_execution_run_id, order.run_number)
        if run is None:
            raise ApplicationError("Only a task's own run looks.", type=FailureCode.INTERNAL.value, non_retryable=True)
        seen = await self._tried(self._store.look(run, within_seconds=self._limit()))
        if seen.life.is_superseded and (again := await current(run)) is not None:
            return await self._tried(self._store.look(again, within_seconds=self._limit()))
        return seen

    @activity.defn
    async def heard(self, order: HeardOrder) -> Heard | None:
        """The newest figures of a job that the gateway stored (decision 4). Raises ApplicationError `internal`."""
        run_id = activity.info().workflow_run_id or ""
        return await self._tried(self._store.heard(order, run_id, within_seconds=self._limit()))

    def _input_of(self, claim: TaskClaim) -> StoredInput | None:
        if claim.input is None or not self._keeps_inputs:
            return None
        if not self._encryption.encrypts:
            return StoredInput(document=claim.input)
        return StoredInput(sealed=self._encryption.sealed(json.dumps(claim.input).encode()))

    def _with_stored_hash(self, claim: TaskClaim) -> TaskClaim:
        return claim.model_copy(update={"input_sha256": self._encryption.keyed_hash(claim.input_sha256)})

    def _limit(self) -> float:
        """Seconds for this try. Raises ApplicationError if the breaker blocks local tries."""
        info = activity.info()
        if info.is_local and not self._breaker.lets_through():
            raise ApplicationError(
                f"PostgreSQL at {self._store.address} could not be used a moment ago, so this write is not tried "
                "locally: it continues as a normal activity, repeated until it succeeds.",
                type=FailureCode.INTERNAL.value,
            )
        return min(TRY_SECONDS, request_limit_seconds(info))

    async def _tried(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            outcome = await uninterrupted(work)
        except StoreUnavailable as failure:
            self._breaker.failed()
            metrics.count_call(metrics.STORE, FailureCode.INTERNAL.value)
            raise ApplicationError(str(failure), type=FailureCode.INTERNAL.value) from None
        except StoreFailure as failure:
            self._breaker.succeeded()
            raise ApplicationError(str(failure), type=_code_of(failure).value, non_retryable=True) from None
        self._breaker.succeeded()
        return outcome


def _code_of(failure: StoreFailure) -> FailureCode:
    """The stable code of a failure that a retry cannot fix."""
    match failure:
        case NotTheClaimant():
            return FailureCode.TASK_EXISTS
        case TaskUnknown() | WriteRefused():
            return FailureCode.INTERNAL
    raise AssertionError(f"unmapped store failure {type(failure).__name__}")
