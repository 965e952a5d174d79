"""The actions behind the training routes (contract §3). They keep no state."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from bridge.calls import CANCEL_UPDATE, LEAST_MINUTES, START_UPDATE, TRAINING_WORKFLOW, run_id_of, workflow_id
from bridge.datasets import (
    CONVERTED,
    HEAD_BYTES,
    NATIVE,
    Placed,
    Plan,
    looks_like_a_picture,
    named,
    plan_of,
)
from bridge.forecast import Forecast
from bridge.orders import TrainingJob, long_list
from bridge.replies import Call, Refused, Reply, Unanswered, checked
from bridge.runs import NewRun, Runs, fingerprint
from bridge.service import GPU_SLOTS, check_callback, demand_runnable, require_user, servers_known
from bridge.storage import STORAGE_ERRORS, Storage
from bridge.template_library import TemplateLibrary
from bridge.templates import RequestRefused, Template
from comfyui_temporal.contracts.comfyui import TrainingRequest, TrainingStatus
from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.paths import is_plain
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.size_budget import MAX_INLINE_LIST_BYTES
from comfyui_temporal.contracts.tasks import Hyperparameters

MAX_FILE_BYTES: Final = 100 * 1024 * 1024
"""ComfyUI's own upload limit."""
MAX_FILES: Final = 10_000
HEADS_AT_ONCE: Final = 32
"""Pictures whose first bytes are read side by side."""
_CHECKPOINT: Final = re.compile(r"epoch-(?P<epoch>\d+)-r\d+_(?P<step>\d+)_steps_")


class TakenTrainingRequest(TrainingRequest):
    """The request as accepted from a caller."""

    task_id: CallerId
    tenant_id: CallerId
    user_id: CallerId
    callback_url: Annotated[str, Field(max_length=2048)]


@dataclass(frozen=True)
class Resumed:
    """Where a resumed training starts."""

    path: str
    epoch: int
    step: int


class TrainingService:
    """Trainings. A dataset is read only from the task's own folder of snapshots below `snapshots_url`."""

    def __init__(
        self,
        runs: Runs,
        forecast: Forecast,
        templates: TemplateLibrary,
        storage: Storage,
        prices: PriceTable,
        *,
        callback_bases: Sequence[str],
        snapshots_url: str,
    ) -> None:
        self._runs = runs
        self._forecast = forecast
        self._templates = templates
        self._storage = storage
        self._prices = prices
        self._callback_bases = tuple(callback_bases)
        self._snapshots = Storage(snapshots_url)

    async def create(self, call: Call) -> Reply:
        request = checked(TakenTrainingRequest, call.body)
        require_user(call.claims, request.tenant_id, request.user_id)
        job = await self._with_long_list_stored(await self._new_job(request, call))
        answer = {
            "training_id": job.training_id,
            "training_status": TrainingStatus.QUEUED.value,
            "estimated_time": job.estimated_time,
            "gpu_hours": job.gpu_hours,
            "gpu_slots": job.gpu_slots,
            "gpu_type": job.gpu_type,
            "dataset_summary": job.dataset_summary,
        }
        return await self._runs.begin(
            NewRun(
                workflow=TRAINING_WORKFLOW,
                workflow_id=workflow_id(request.tenant_id, call.key),
                kind="training",
                argument=job,
                answer=answer,
                fingerprint=fingerprint(call.path, call.body),
                task_id=request.task_id,
                tenant_id=request.tenant_id,
                user_id=request.user_id,
                scene=Scene.MODEL_TRAIN,
                template_id=job.graph.rendered.template_id,
                priority=request.priority,
            )
        )

    async def get(self, call: Call) -> Reply:
        return Reply(200, await self._runs.view(call.run_id, kind="training", tenant_id=call.claims.tenant_id))

    async def start(self, call: Call) -> Reply:
        return await self._update(call, START_UPDATE)

    async def cancel(self, call: Call) -> Reply:
        return await self._update(call, CANCEL_UPDATE)

    async def _update(self, call: Call, update: str) -> Reply:
        tenant_id = call.claims.tenant_id
        return Reply(200, await self._runs.update(call.run_id, update, call.key, kind="training", tenant_id=tenant_id))

    async def _new_job(self, request: TakenTrainingRequest, call: Call) -> TrainingJob:
        """Check the request: everything that can be refused is refused here, before anything is queued."""
        check_callback(request.callback_url, self._callback_bases, request.task_id)
        hyperparameters = self._hyperparameters(request)
        template = self._template(request.base_model)
        plan = await self._plan(request)
        resumed = self._resumed(request)
        if resumed is not None and resumed.epoch >= hyperparameters.epochs:
            raise _invalid("resume_from", f"is of epoch {resumed.epoch}; hyperparameters.epochs must be higher")
        try:
            graph = template.render_training(request.base_model, hyperparameters.model_dump(mode="json"))
        except RequestRefused as refused:
            raise Refused("payload_invalid", fields=refused.fields) from None
        can_run = await self._forecast.can_run(template.manifest.pool, template.template_id)
        demand_runnable(can_run, template.template_id)
        training = template.manifest.training
        assert training is not None
        first_epoch = resumed.epoch if resumed else 0
        steps_per_epoch = math.ceil(len(plan.pictures) / hyperparameters.batch_size)
        seconds_per_step = training.seconds_per_image * hyperparameters.batch_size
        epochs = hyperparameters.epochs - first_epoch
        hours = max(epochs * steps_per_epoch * seconds_per_step / 3600, 0.0001)
        return TrainingJob(
            training_id=run_id_of("training", request.tenant_id, call.key),
            request=request,
            graph=graph,
            epochs=hyperparameters.epochs,
            steps_per_epoch=steps_per_epoch,
            epochs_per_chunk=math.ceil(epochs / training.checkpoints),
            first_epoch=first_epoch,
            first_step=resumed.step if resumed else 0,
            resume_path=resumed.path if resumed else None,
            checkpoint_root=self._storage.url,
            seconds_per_step=seconds_per_step,
            gpu_hours=round(hours, 4),
            estimated_time=round(max(hours * 60, 2 * LEAST_MINUTES), 2),
            gpu_slots=GPU_SLOTS,
            gpu_type=await self._gpu_type(request.gpu_type, template.manifest.pool),
            is_for_some=not can_run.by_all,
            dataset_summary=plan.summary(),
        )

    async def _with_long_list_stored(self, job: TrainingJob) -> TrainingJob:
        """Move a long list of files to storage, under a name that no other request uses."""
        dataset = job.request.dataset
        raw = dataset.model_dump_json().encode()
        if len(raw) <= MAX_INLINE_LIST_BYTES:
            return job
        sha256 = hashlib.sha256(raw).hexdigest()
        try:
            await self._storage.write(long_list(job.training_id, sha256), raw, "application/json")
        except STORAGE_ERRORS as error:
            raise Unanswered(503, f"the bridge's storage cannot be written: {type(error).__name__}") from None
        request = job.request.model_copy(update={"dataset": dataset.model_copy(update={"files": []})})
        return job.model_copy(update={"request": request, "list_sha256": sha256})

    def _hyperparameters(self, request: TakenTrainingRequest) -> Hyperparameters:
        try:
            return checked(Hyperparameters, request.hyperparameters)
        except Refused as refused:
            raise Refused("payload_invalid", fields=[f"hyperparameters.{line}" for line in refused.fields]) from None

    def _template(self, base_model: str) -> Template:
        offered = {
            name: template
            for template in self._templates.of_scene(Scene.MODEL_TRAIN)
            for name in (template.manifest.training.base_models if template.manifest.training else ())
            if name in self._prices.base_models
        }
        if base_model not in offered:
            raise _invalid("base_model", f"{base_model!r} is not offered; offered are {', '.join(sorted(offered))}")
        return offered[base_model]

    async def _plan(self, request: TakenTrainingRequest) -> Plan:
        """What of the dataset is trained on. Raises Refused if it cannot be trained on, or must not be read."""
        dataset = request.dataset
        path = self._snapshots.path_of(dataset.snapshot_uri.rstrip("/")) or ""
        if not path.startswith(f"snapshots/{request.task_id}/"):
            raise _invalid("dataset.snapshot_uri", "is not below the task's own folder of the object storage")
        if len(dataset.files) > MAX_FILES:
            raise _invalid("dataset.files", f"at most {MAX_FILES} are accepted")
        for file in dataset.files:
            if not is_plain(file.path):
                raise _invalid("dataset.files", f"{file.path!r} must be a relative path without '..'")
            if file.size_bytes > MAX_FILE_BYTES:
                raise _invalid("dataset.files", f"{file.path!r} is larger than {MAX_FILE_BYTES} bytes")
        plan = plan_of(dataset.files)
        if not plan.pictures:
            taken = ", ".join(sorted(suffix[1:] for suffix in NATIVE | CONVERTED))
            raise _invalid("dataset.files", f"has no picture ({taken}) to train on")
        await self._demand_pictures(dataset.snapshot_uri, plan)
        return plan

    async def _demand_pictures(self, snapshot_uri: str, plan: Plan) -> None:
        """Raises Refused with the names of files that are no pictures, before anything costs anything."""
        snapshot = Storage(snapshot_uri)
        at_once = asyncio.Semaphore(HEADS_AT_ONCE)

        async def is_picture(placed: Placed) -> bool:
            async with at_once:
                end = min(HEAD_BYTES, placed.file.size_bytes)
                return looks_like_a_picture(
                    b"".join([part async for part in snapshot.read_part(placed.file.path, 0, end)])
                )

        try:
            found = await asyncio.gather(*(is_picture(placed) for placed in plan.pictures))
        except FileNotFoundError:
            raise _invalid("dataset.files", "names a file that is not in the snapshot") from None
        except STORAGE_ERRORS as error:
            raise Unanswered(503, f"the dataset's snapshot cannot be read now: {type(error).__name__}") from None
        corrupt = [placed.file.path for placed, is_one in zip(plan.pictures, found, strict=True) if not is_one]
        if corrupt:
            raise _invalid("dataset.files", f"{named(corrupt)}: no pictures, whatever their names say")

    def _resumed(self, request: TakenTrainingRequest) -> Resumed | None:
        if request.resume_from is None:
            return None
        path = self._storage.path_of(request.resume_from)
        match = _CHECKPOINT.search(path or "")
        if path is None or match is None or not path.startswith(f"checkpoints/{request.tenant_id}/"):
            raise _invalid("resume_from", "is no checkpoint of this tenant")
        return Resumed(path, int(match["epoch"]), int(match["step"]))

    async def _gpu_type(self, requested: str | None, pool: str) -> str:
        with servers_known():
            offered = await self._forecast.gpu_types(pool)
        if requested is not None and requested not in offered:
            raise _invalid("gpu_type", f"no server has {requested!r}; offered are {', '.join(offered) or 'none'}")
        return requested or (offered[0] if offered else "any")


def _invalid(field: str, problem: str) -> Refused:
    return Refused("payload_invalid", fields=[f"{field}: {problem}"])
