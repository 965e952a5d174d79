"""Every point of both flows: a place in a call, or a wait; and the path that leads there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proof.kill_points import paths
from proof.kill_points.gates import AFTER_EFFECT, AFTER_REPLY, BEFORE_REPORT, BEFORE_SEND, JOB_UPDATE, Gate, Phase
from proof.kill_points.paths import TaskPath

ALL_PHASES: Final[tuple[Phase, ...]] = (BEFORE_SEND, AFTER_EFFECT, AFTER_REPLY, BEFORE_REPORT)
OWN_PHASES: Final[tuple[Phase, ...]] = (BEFORE_SEND, BEFORE_REPORT)
"""The phases of points that are no call to another service."""
ROUTES: Final = frozenset(
    {
        *("submit_job", "get_job", "cancel_job", "create_training", "start_training", "get_training"),
        *("cancel_training", "list_gpus", "estimate", "pre_deduct", "commit", "cancel_hold", "charge", "ledger"),
    }
)


@dataclass(frozen=True)
class Point:
    """Where a task is when the fault is injected."""

    scene: str
    """`image` or `training`."""
    name: str
    path: TaskPath
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
    path: TaskPath
    about: str = ""
    phases: Sequence[Phase] = ALL_PHASES
    only_visible: bool = False
    name: str = ""

    def points(self, scene: str) -> list[Point]:
        named = self.name or self.call
        return [
            Point(
                scene,
                f"{named}, {phase}",
                self.path,
                Gate(call=self.call, phase=phase, about=self.about, only_visible=self.only_visible),
            )
            for phase in self.phases
        ]


def _write(fact: str, path: TaskPath, *, only_visible: bool = False, name: str = "") -> _Call:
    shown = name or f"write {fact}"
    return _Call("write", path, f"^{fact}$", OWN_PHASES, only_visible, f"{shown} (visible)" if only_visible else shown)


_IMAGE_CALLS: Final = (
    _Call("claim", paths.PLAIN, phases=OWN_PHASES),
    _Call("submit_job", paths.PLAIN),
    _Call("estimate", paths.PLAIN),
    _Call("estimate", paths.PLAIN, phases=OWN_PHASES, only_visible=True, name="estimate (visible)"),
    _Call("pre_deduct", paths.PLAIN),
    _write("held:1", paths.PLAIN),
    _write("held:1", paths.PLAIN, only_visible=True),
    _write(JOB_UPDATE, paths.PLAIN),
    _Call("get_job", paths.POLLED),
    _Call("commit", paths.PLAIN),
    _write("settled", paths.PLAIN),
    _write("end", paths.PLAIN, name="write last event"),
    _Call("ledger", paths.EXPIRED, phases=(AFTER_EFFECT, BEFORE_REPORT)),
    _Call("charge", paths.EXPIRED),
    _Call("cancel_job", paths.CANCELLED),
    _Call("cancel_hold", paths.CANCELLED),
    _write("given_back:1", paths.CANCELLED),
    _write("end", paths.CANCELLED, name="write last event, cancelled"),
    _Call("cancel_hold", paths.FAILING, phases=(AFTER_EFFECT, BEFORE_REPORT), name="cancel_hold of a failed job"),
    _Call("cancel_job", paths.RETRIED, "cancel:1", (BEFORE_SEND, AFTER_EFFECT), name="cancel_job before a retry"),
    _Call("submit_job", paths.RETRIED, "submit:2", name="submit_job again"),
    _Call("pre_deduct", paths.TOPPED_UP, "pre_deduct:2", name="pre_deduct of a top-up"),
    _Call("cancel_hold", paths.TOPPED_UP, "cancel:1", name="cancel_hold of the old hold"),
    _Call("commit", paths.CONTINUED_DELIVERED, phases=(AFTER_EFFECT, BEFORE_REPORT), name="commit, continued"),
    _Call("cancel_hold", paths.CONTINUED_CANCELLED, phases=(AFTER_EFFECT,), name="cancel_hold, continued"),
)
_TRAINING_CALLS: Final = (
    _Call("claim", paths.PLAIN, phases=OWN_PHASES),
    _Call("list_gpus", paths.PLAIN, phases=OWN_PHASES),
    _Call("snapshot", paths.PLAIN, phases=OWN_PHASES),
    _Call("create_training", paths.PLAIN),
    _Call("estimate", paths.PLAIN, phases=OWN_PHASES),
    _Call("pre_deduct", paths.PLAIN),
    _Call("start_training", paths.PLAIN),
    _write(JOB_UPDATE, paths.PLAIN),
    _Call("get_training", paths.POLLED, phases=(BEFORE_SEND, AFTER_EFFECT)),
    _Call("pre_deduct", paths.DEARER, "pre_deduct:2", name="pre_deduct of a renewal"),
    _Call("cancel_hold", paths.DEARER, "cancel:1", name="cancel_hold of the renewed hold"),
    _Call("commit", paths.PLAIN),
    _Call("delete_snapshot", paths.PLAIN, phases=OWN_PHASES),
    _write("end", paths.PLAIN, name="write last event"),
    _Call("cancel_training", paths.CANCELLED),
    _Call("cancel_hold", paths.CANCELLED),
    _Call("delete_snapshot", paths.CANCELLED, phases=OWN_PHASES, name="delete_snapshot, cancelled"),
    _Call("create_training", paths.RETRIED, "submit:2", name="create_training from a checkpoint"),
    _Call("commit", paths.CONTINUED_DELIVERED, phases=(AFTER_EFFECT, BEFORE_REPORT), name="commit, continued"),
)
_IMAGE_WAITS: Final = {
    "wait for ComfyUI": paths.WAITING,
    "wait for the next attempt": paths.RETRY_WAIT,
    "wait for ComfyUI, continued": paths.CONTINUED,
    **{f"continue as new, {after} ms after": paths.continuing(after) for after in (0, 10, 50)},
}
_TRAINING_WAITS: Final = {
    "wait for a confirmed price": paths.CONFIRMING,
    "wait for ComfyUI": paths.WAITING,
    "wait for ComfyUI, continued": paths.CONTINUED,
    **{f"continue as new, {after} ms after": paths.continuing(after) for after in (0, 10, 50)},
}


def all_points() -> list[Point]:
    """In the order of the flows."""
    return [
        *(point for call in _IMAGE_CALLS for point in call.points("image")),
        *(Point("image", name, path) for name, path in _IMAGE_WAITS.items()),
        *(point for call in _TRAINING_CALLS for point in call.points("training")),
        *(Point("training", name, path) for name, path in _TRAINING_WAITS.items()),
    ]
