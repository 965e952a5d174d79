"""Every instant of both flows: a call and where in it, or a wait; and the way that leads there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proof.kill_points import ways
from proof.kill_points.gates import AFTER_EFFECT, AFTER_REPLY, BEFORE_REPORT, BEFORE_SEND, NEWS, Gate, Phase
from proof.kill_points.ways import Way

ALL_PHASES: Final[tuple[Phase, ...]] = (BEFORE_SEND, AFTER_EFFECT, AFTER_REPLY, BEFORE_REPORT)
OWN_PHASES: Final[tuple[Phase, ...]] = (BEFORE_SEND, BEFORE_REPORT)
"""Of what is no call to another service."""
ROUTES: Final = frozenset(
    {
        *("submit_job", "get_job", "cancel_job", "create_training", "start_training", "get_training"),
        *("cancel_training", "list_gpus", "estimate", "pre_deduct", "commit", "cancel_hold", "charge", "ledger"),
    }
)


@dataclass(frozen=True)
class Instant:
    """Where a task is when the blow falls."""

    scene: str
    """`image` or `training`."""
    name: str
    way: Way
    gate: Gate | None = None

    @property
    def label(self) -> str:
        return f"{self.scene}: {self.name}"

    @property
    def phase(self) -> Phase | None:
        return self.gate.phase if self.gate else None

    @property
    def is_route(self) -> bool:
        """Whether it is a call to ComfyUI or credits."""
        return self.gate is not None and self.gate.call in ROUTES


@dataclass(frozen=True)
class _Call:
    call: str
    way: Way
    about: str = ""
    phases: Sequence[Phase] = ALL_PHASES
    only_visible: bool = False
    name: str = ""

    def instants(self, scene: str) -> list[Instant]:
        named = self.name or self.call
        return [
            Instant(
                scene,
                f"{named}, {phase}",
                self.way,
                Gate(call=self.call, phase=phase, about=self.about, only_visible=self.only_visible),
            )
            for phase in self.phases
        ]


def _write(fact: str, way: Way, *, only_visible: bool = False, name: str = "") -> _Call:
    shown = name or f"write {fact}"
    return _Call("write", way, f"^{fact}$", OWN_PHASES, only_visible, f"{shown} (visible)" if only_visible else shown)


_IMAGE_CALLS: Final = (
    _Call("claim", ways.PLAIN, phases=OWN_PHASES),
    _Call("submit_job", ways.PLAIN),
    _Call("estimate", ways.PLAIN),
    _Call("estimate", ways.PLAIN, phases=OWN_PHASES, only_visible=True, name="estimate (visible)"),
    _Call("pre_deduct", ways.PLAIN),
    _write("held:1", ways.PLAIN),
    _write("held:1", ways.PLAIN, only_visible=True),
    _write(NEWS, ways.PLAIN),
    _Call("get_job", ways.POLLED),
    _Call("commit", ways.PLAIN),
    _write("settled", ways.PLAIN),
    _write("end", ways.PLAIN, name="write last event"),
    _Call("ledger", ways.EXPIRED, phases=(AFTER_EFFECT, BEFORE_REPORT)),
    _Call("charge", ways.EXPIRED),
    _Call("cancel_job", ways.CANCELLED),
    _Call("cancel_hold", ways.CANCELLED),
    _write("given_back:1", ways.CANCELLED),
    _write("end", ways.CANCELLED, name="write last event, cancelled"),
    _Call("cancel_hold", ways.FAILING, phases=(AFTER_EFFECT, BEFORE_REPORT), name="cancel_hold of a failed job"),
    _Call("cancel_job", ways.RETRIED, "cancel:1", (BEFORE_SEND, AFTER_EFFECT), name="cancel_job before a retry"),
    _Call("submit_job", ways.RETRIED, "submit:2", name="submit_job again"),
    _Call("pre_deduct", ways.TOPPED_UP, "pre_deduct:2", name="pre_deduct of a top-up"),
    _Call("cancel_hold", ways.TOPPED_UP, "cancel:1", name="cancel_hold of the old hold"),
    _Call("commit", ways.CONTINUED_DELIVERED, phases=(AFTER_EFFECT, BEFORE_REPORT), name="commit, continued"),
    _Call("cancel_hold", ways.CONTINUED_CANCELLED, phases=(AFTER_EFFECT,), name="cancel_hold, continued"),
)
_TRAINING_CALLS: Final = (
    _Call("claim", ways.PLAIN, phases=OWN_PHASES),
    _Call("list_gpus", ways.PLAIN, phases=OWN_PHASES),
    _Call("snapshot", ways.PLAIN, phases=OWN_PHASES),
    _Call("create_training", ways.PLAIN),
    _Call("estimate", ways.PLAIN, phases=OWN_PHASES),
    _Call("pre_deduct", ways.PLAIN),
    _Call("start_training", ways.PLAIN),
    _write(NEWS, ways.PLAIN),
    _Call("get_training", ways.POLLED, phases=(BEFORE_SEND, AFTER_EFFECT)),
    _Call("pre_deduct", ways.DEARER, "pre_deduct:2", name="pre_deduct of a renewal"),
    _Call("cancel_hold", ways.DEARER, "cancel:1", name="cancel_hold of the renewed hold"),
    _Call("commit", ways.PLAIN),
    _Call("delete_snapshot", ways.PLAIN, phases=OWN_PHASES),
    _write("end", ways.PLAIN, name="write last event"),
    _Call("cancel_training", ways.CANCELLED),
    _Call("cancel_hold", ways.CANCELLED),
    _Call("delete_snapshot", ways.CANCELLED, phases=OWN_PHASES, name="delete_snapshot, cancelled"),
    _Call("create_training", ways.RETRIED, "submit:2", name="create_training from a checkpoint"),
    _Call("commit", ways.CONTINUED_DELIVERED, phases=(AFTER_EFFECT, BEFORE_REPORT), name="commit, continued"),
)
_IMAGE_WAITS: Final = {
    "wait for ComfyUI": ways.WAITING,
    "wait for the next attempt": ways.RETRY_WAIT,
    "wait for ComfyUI, continued": ways.CONTINUED,
    **{f"continue as new, {after} ms after": ways.continuing(after) for after in (0, 10, 50)},
}
_TRAINING_WAITS: Final = {
    "wait for a confirmed price": ways.CONFIRMING,
    "wait for ComfyUI": ways.WAITING,
    "wait for ComfyUI, continued": ways.CONTINUED,
    **{f"continue as new, {after} ms after": ways.continuing(after) for after in (0, 10, 50)},
}


def all_instants() -> list[Instant]:
    """In the order of the flows."""
    return [
        *(instant for call in _IMAGE_CALLS for instant in call.instants("image")),
        *(Instant("image", name, way) for name, way in _IMAGE_WAITS.items()),
        *(instant for call in _TRAINING_CALLS for instant in call.instants("training")),
        *(Instant("training", name, way) for name, way in _TRAINING_WAITS.items()),
    ]
