"""What clients, operators and machines do to a running task: cancel it, confirm its price, kill its worker."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from temporalio.api.common.v1 import Payload

from comfyui_temporal.contracts.start_answer import WAIT_UNTIL_HELD, WaitUntilHeld
from comfyui_temporal.contracts.tasks import CALLBACK_SIGNAL, CancelTask, ConfirmPrice
from proof.simulation.hosted_run import payload_of
from proof.simulation.oracle import Oracle
from proof.simulation.parties import Parties
from proof.simulation.scenario import Action
from proof.simulation.server import Server
from proof.simulation.timeline import Timeline
from proof.simulation.trace import Trace

GARBAGE: Final[tuple[tuple[Payload, ...], ...]] = (
    (),
    (payload_of(None),),
    (payload_of({}), payload_of({})),
    (payload_of("text"),),
    (payload_of([]),),
    (payload_of({"job_id": 5, "job_status": {}, "sequence": "many"}),),
    (payload_of({"job_id": "job-1", "training_id": "training-1", "task_id": "another"}),),
    (payload_of({"job_id": "job-99", "job_status": "delivery", "result_urls": ["https://x.example/"], "sequence": 9}),),
    (Payload(metadata={"encoding": b"json/plain"}, data=b'{"job_id": "job-1", "sequence": Infinity'),),
    (Payload(metadata={"encoding": b"json/plain"}, data=b'{"job_id": "job-1", "stage_progress": NaN}'),),
    (Payload(metadata={"encoding": b"json/plain"}, data=b"[" * 3_000),),
    (Payload(metadata={"encoding": b"json/plain"}, data=b'{"job_id": "\\ud800", "job_status": "queued"}'),),
    (Payload(metadata={"encoding": b"binary/plain"}, data=b"\x00\xff"),),
    (Payload(data=b"bare"),),
)
BAD_ARGUMENTS: Final[tuple[tuple[Payload, ...], ...]] = (
    (),
    (payload_of(None),),
    (payload_of({"reason": 5}),),
    (payload_of({}), payload_of({})),
)


class Clients:
    """Clients, operators and machines. `received`: the callbacks that were sent so far."""

    def __init__(
        self, rng: random.Random, timeline: Timeline, server: Server, oracle: Oracle, parties: Parties, trace: Trace
    ) -> None:
        self._rng = rng
        self._timeline = timeline
        self._server = server
        self._oracle = oracle
        self._parties = parties
        self._trace = trace
        self.received: list[Payload] = []
        self._actions: dict[Action, Callable[[], None]] = {
            Action.CANCEL_BY_UPDATE: self._cancel_by_update,
            Action.CANCEL_BY_TEMPORAL: self._cancel_by_temporal,
            Action.CONFIRM: self._confirm,
            Action.WAIT_UNTIL_HELD: self._wait_until_held,
            Action.BAD_UPDATE: self._send_bad_update,
            Action.GARBAGE: self._send_garbage,
            Action.OLD_CALLBACK: self._send_old_callback,
            Action.QUERY: self._query,
            Action.KILL: lambda: server.kill_worker(rng.choice((0.5, 3.0, 30.0))),
            Action.LONG_KILL: lambda: server.kill_worker(1_200.0),
            Action.EVICT: server.evict,
            Action.HOLD_CANCELLED_BY_OPERATOR: parties.credits.cancel_by_operator,
            Action.RESET: self._reset,
            Action.PAUSE: lambda: server.pause(rng.choice((5.0, 100.0, 2_000.0))),
            Action.OLD_WRITE: lambda: parties.store.write_again(rng),
            Action.BALANCE_RISES: lambda: self._set_balance(parties.credits.balance + 500),
            Action.BALANCE_FALLS: lambda: self._set_balance(0),
        }

    def do(self, action: Action) -> None:
        """Do it, unless the task has ended: then it may still be reset."""
        if self._server.closed is None or action is Action.RESET:
            self._trace("ACTION: %s", action.value)
            self._actions[action]()

    def _cancel_by_update(self) -> None:
        name = f"cancel-{len(self._oracle.cancels)}"
        self._oracle.cancels[name] = False
        self._server.update(name, "cancel_task", payload_of(CancelTask(reason="no longer wanted")))

    def _cancel_by_temporal(self) -> None:
        self._oracle.cancels[f"cancel-{len(self._oracle.cancels)}"] = True
        self._server.request_cancel("no longer wanted")

    def _confirm(self) -> None:
        request = ConfirmPrice(max_credits=self._rng.choice((150, 300, 1_000)))
        self._server.update(f"confirm-{self._timeline.steps}", "confirm_price", payload_of(request))

    def _wait_until_held(self) -> None:
        self._server.update(f"wait-{self._timeline.steps}", WAIT_UNTIL_HELD, payload_of(WaitUntilHeld()))

    def _send_bad_update(self) -> None:
        name = self._rng.choice(("cancel_task", "confirm_price", "none"))
        self._server.update(f"bad-{self._timeline.steps}", name, *self._rng.choice(BAD_ARGUMENTS))

    def _send_garbage(self) -> None:
        name = self._rng.choice((CALLBACK_SIGNAL, CALLBACK_SIGNAL, "no_such_signal"))
        self._server.signal(name, *self._rng.choice(GARBAGE))

    def _send_old_callback(self) -> None:
        if self.received:
            self._server.signal(CALLBACK_SIGNAL, self._rng.choice(self.received))

    def _query(self) -> None:
        for name in ("progress", "credits"):
            answer = self._server.query(name)
            if answer is not None:
                self._oracle.asked(name, answer)

    def _reset(self) -> None:
        self._oracle.was_reset()
        self._server.reset()

    def _set_balance(self, points: int) -> None:
        self._parties.credits.balance = points
