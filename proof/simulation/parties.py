"""Which model answers which activity, by the activity's name and type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from temporalio.api.common.v1 import Payload

from activities.comfyui import ComfyUIActivities
from activities.credits import CreditsActivities
from activities.datasets import DatasetActivities
from activities.earlier_runs import EarlierRunActivities
from activities.task_store import TaskStoreActivities
from comfyui_temporal.contracts.calls import Post, SnapshotOrder
from comfyui_temporal.contracts.comfyui import ManifestReference, SnapshotReference, TrainingAccepted, TrainingDraft
from comfyui_temporal.contracts.errors import Answer, FailureCode
from comfyui_temporal.contracts.give_back import EarlierJobs
from comfyui_temporal.contracts.lives import STORE_UNAVAILABLE
from proof.simulation.comfyui_model import UnreadableAnswer
from proof.simulation.credits_model import ActedAndFailed, CreditsModel
from proof.simulation.fault_schedule import Party
from proof.simulation.hosted_run import CONVERTER
from proof.simulation.image_jobs import ImageJobs
from proof.simulation.life_gate import LifeGate, StoreAway
from proof.simulation.sdk import activity_definition
from proof.simulation.store_model import Caller, StoreModel, StoreRefused
from proof.simulation.timeline import Timeline
from proof.simulation.trainings import Trainings

_HOLDERS: Final = {
    Party.COMFYUI: ComfyUIActivities,
    Party.CREDITS: CreditsActivities,
    Party.OBJECTS: DatasetActivities,
    Party.STORE: TaskStoreActivities,
}
_OF_RUNS: Final = EarlierRunActivities
"""They read the store and Temporal, which is there whenever a run is."""


def _definitions() -> dict[str, tuple[Party, list[type]]]:
    found = {}
    for party, holder in [*_HOLDERS.items(), (Party.STORE, _OF_RUNS)]:
        for method in vars(holder).values():
            definition = activity_definition(method) if callable(method) else None
            if definition is not None and definition.name is not None:
                found[definition.name] = (party, definition.arg_types or [])
    return found


_DEFINITIONS: Final = _definitions()
_UNAVAILABLE: Final = {
    Party.CREDITS: FailureCode.CREDITS_UNAVAILABLE,
    Party.COMFYUI: FailureCode.COMFYUI_UNAVAILABLE,
    Party.STORE: FailureCode.INTERNAL,
    Party.OBJECTS: FailureCode.DATASET_INVALID,
}


class CallRefused(Exception):
    """What an activity raises although it was answered; `is_final`: no retry can help."""

    def __init__(self, code: str, reason: str, *, is_final: bool) -> None:
        self.code = code
        self.is_final = is_final
        super().__init__(reason)


class Objects:
    """Temporary object storage. A copy that began before its deletion does not stay."""

    def __init__(self, timeline: Timeline, *, is_invalid: bool) -> None:
        self._timeline = timeline
        self.is_invalid = is_invalid
        self.kept: set[str] = set()
        self._deleted_at: dict[str, float] = {}

    def snapshot(self, order: SnapshotOrder, caller: Caller) -> SnapshotReference:
        if caller.began_at <= self._deleted_at.get(order.call_for.task_id, -1.0):
            raise CallRefused(FailureCode.DATASET_INVALID, "the copy was deleted while it was made", is_final=True)
        self.kept.add(order.call_for.task_id)
        if self.is_invalid:
            raise CallRefused(FailureCode.DATASET_INVALID, "a file of the dataset is missing", is_final=True)
        manifest = ManifestReference(uri="file:///manifest.json", sha256="0" * 64, file_count=1, total_bytes=1)
        return SnapshotReference(dataset_id=order.dataset_id, snapshot_uri="file:///snapshots/1/", manifest=manifest)

    def delete_snapshot(self, order: SnapshotOrder, caller: Caller) -> None:
        self.kept.discard(order.call_for.task_id)
        ordered_before = self._deleted_at.get(order.call_for.task_id, -1.0)
        self._deleted_at[order.call_for.task_id] = max(ordered_before, caller.scheduled_at)


class Parties:
    """The services, behind the activities' names."""

    def __init__(
        self,
        credits: CreditsModel,
        jobs: ImageJobs,
        trainings: Trainings,
        store: StoreModel,
        objects: Objects,
        gate: LifeGate,
    ) -> None:
        self.credits, self.jobs, self.trainings, self.store, self.objects = credits, jobs, trainings, store, objects
        self._gate = gate
        self.called: list[str] = []
        self._routes: dict[str, Callable[[Any], Any]] = {
            "estimate": credits.estimate,
            "pre_deduct": credits.pre_deduct,
            "commit": credits.commit,
            "cancel_hold": credits.cancel_hold,
            "charge": credits.charge,
            "ledger": credits.ledger,
            "submit_job": jobs.submit,
            "get_job": jobs.get,
            "cancel_job": jobs.cancel,
            "create_training": self._create_training,
            "start_training": trainings.start,
            "get_training": trainings.get,
            "cancel_training": trainings.cancel,
            "list_gpus": trainings.list_gpus,
        }
        self._of_our_own: dict[str, Callable[[Any, Caller], Any]] = {
            "snapshot": objects.snapshot,
            "delete_snapshot": objects.delete_snapshot,
            "claim": store.claim,
            "write": store.write,
            "look": store.look,
            "heard": store.heard,
            "unanswered_jobs": lambda _order, _caller: self.unanswered_jobs(),
        }
        self.unanswered_jobs: Callable[[], EarlierJobs] = EarlierJobs

    def _create_training(self, post: Post[TrainingDraft]) -> Answer[TrainingAccepted]:
        """The list of files is read from the snapshot, also for a repeat."""
        if post.call_for.task_id not in self.objects.kept:
            raise CallRefused(FailureCode.DATASET_INVALID, "the list of files is missing", is_final=True)
        answer: Answer[TrainingAccepted] = self.trainings.submit(post)
        return answer

    def party_of(self, name: str) -> Party:
        return _DEFINITIONS[name][0]

    def unavailable(self, name: str) -> FailureCode:
        return _UNAVAILABLE[self.party_of(name)]

    def argument_of(self, name: str, payloads: Sequence[Payload]) -> Any:
        """The activity's one argument, decoded as a worker decodes it."""
        [argument] = CONVERTER.from_payloads(payloads, _DEFINITIONS[name][1])
        return argument

    def perform(self, name: str, argument: Any, caller: Caller) -> Any:
        """Do it: its answer. Raises CallRefused."""
        self.called.append(name)
        try:
            if name in self._of_our_own:
                return self._of_our_own[name](argument, caller)
            return self._gate.through(name, argument, caller, self._routes[name])
        except StoreAway:
            raise CallRefused(STORE_UNAVAILABLE, "the task store did not answer", is_final=False) from None
        except UnreadableAnswer:
            raise CallRefused(FailureCode.REPLY_INVALID, f"{name} got no readable answer", is_final=False) from None
        except ActedAndFailed:
            raise CallRefused(
                FailureCode.CREDITS_UNAVAILABLE, f"{name} was answered with 500", is_final=False
            ) from None
        except StoreRefused as refusal:
            raise CallRefused(FailureCode.TASK_EXISTS, str(refusal), is_final=True) from None
