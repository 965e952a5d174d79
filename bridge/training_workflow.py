"""A training as a workflow: queued until it is started, then trained chunk by chunk, each from the one before.

    data_ingest   the dataset is uploaded to the server that took the training, and its checksums are verified
    training      one graph per chunk: `running` while it trains, `checkpointing` while its LoRA is copied to storage
    evaluating    the last loss of the chunks' runs
    publishing    the last checkpoint becomes the model

ComfyUI writes no checkpoint during a run and keeps no optimizer state. So a failure costs one chunk, and a resumed
training starts from the last chunk. Between chunks the server is free for other jobs, and the next chunk may run
elsewhere.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
from datetime import timedelta
from typing import Any, Final

from temporalio import workflow
from temporalio.workflow import ActivityCancellationType

from bridge.calls import (
    INGEST_DATASET,
    LEAST_MINUTES,
    PUBLISH_MODEL,
    SERVER_MEMO,
    START_UPDATE,
    TRAINING_WORKFLOW,
)
from bridge.orders import (
    DatasetOrder,
    ExistingLora,
    GraphOutcome,
    GraphRun,
    JobView,
    PublishOrder,
    Ref,
    RenderedGraph,
    ServerTaken,
    StoredResult,
    TrainingJob,
)
from bridge.placement import HEARTBEAT_TIMEOUT, SERVER_AWAY
from bridge.run_flow import STORE_RETRY, RunFlow, instant, minutes
from bridge.server import ResultFile
from comfyui_temporal.contracts.comfyui import LogLevel, TrainingStage, TrainingStatus
from comfyui_temporal.contracts.tasks import TaskStatus

INGEST_WITHIN: Final = timedelta(hours=4)
LORA_FOLDER: Final = "comfyui-temporal"
"""Subfolder of the server's folders for inputs and for trained LoRAs."""


@workflow.defn(name=TRAINING_WORKFLOW)
class ComfyUITrainingWorkflow(RunFlow):
    """One training (contract §3)."""

    @workflow.init
    def __init__(self, job: TrainingJob) -> None:
        self._job = job
        self._is_started = False
        self._started_at = workflow.now()
        self._epoch = self._chunk_end = job.first_epoch
        self._step = job.first_step
        self._latest = job.resume_path
        self._latest_sha256: str | None = None
        self._hours = 0.0
        self._trained_steps = 0
        self._loss: float | None = None
        fields: dict[str, Any] = {
            "training_id": job.training_id,
            "training_status": TrainingStatus.QUEUED.value,
            "training_stage": None,
            "stage_progress": 0.0,
            "next_eta": None,
            "estimated_time": job.estimated_time,
            "gpu_hours": job.gpu_hours,
            "gpu_hours_used": 0.0,
            "gpu_slots": job.gpu_slots,
            "gpu_type": job.gpu_type,
            "checkpoint": None,
            "output": None,
            "error_details": None,
        }
        self._open(job.training_id, job.request, job.graph.rendered, fields, is_for_some=job.is_for_some)

    @workflow.run
    async def run(self, job: TrainingJob) -> JobView:
        """The training's last state."""
        self._change("queued")
        await self._finish(self._train())
        await self._after_the_end(self._placement.clean_up(self._dataset, is_last=True))
        await self._after_the_end(self._publishing.all_published())
        return self.view()

    @workflow.update(name=START_UPDATE)
    def start(self) -> JobView:
        """Start a queued training. Called once credits are held. Idempotent."""
        if not self._is_started and not self._is_over:
            self._is_started = True
            self._started_at = workflow.now()
            self._fields["next_eta"] = instant(self._started_at + timedelta(minutes=self._job.estimated_time))
            self._publishing.number()
        return self.view()

    @property
    def _is_over(self) -> bool:
        ended = self._fields["training_status"] in (TrainingStatus.COMPLETED, TrainingStatus.FAILED)
        return ended or self._fields["error_details"] is not None

    def _task_status(self) -> TaskStatus:
        by_status = {
            TrainingStatus.QUEUED: TaskStatus.QUEUED,
            TrainingStatus.RUNNING: TaskStatus.RUNNING,
            TrainingStatus.CHECKPOINTING: TaskStatus.RUNNING,
        }
        status = TrainingStatus(self._fields["training_status"])
        return self._ended_status() or by_status.get(status, TaskStatus.COMPLETED)

    def _stage(self) -> str:
        return str(self._fields["training_stage"] or TrainingStatus.QUEUED.value)

    def _end_fields(self) -> dict[str, Any]:
        return {"training_status": TrainingStatus.FAILED.value}

    # Steps

    async def _train(self) -> None:
        await workflow.wait_condition(lambda: self._is_started)
        while self._epoch < self._job.epochs:
            await self._chunk(min(self._epoch + self._job.epochs_per_chunk, self._job.epochs))
        loss = "unknown" if self._loss is None else f"{self._loss:.4f}"
        self._enter(TrainingStage.EVALUATING, f"evaluation loss={loss}")
        await self._publish_model()

    async def _chunk(self, last_epoch: int) -> None:
        """Train to the end of an epoch and keep the result. Raises RunRefused, or a cancellation."""
        steps = (last_epoch - self._epoch) * self._job.steps_per_epoch
        self._placement.begin_part(last_epoch)
        self._chunk_end = last_epoch
        whole = self._job.epochs - self._job.first_epoch
        done = self._epoch - self._job.first_epoch
        self._progress_span = (100 * done / whole, 100 * (last_epoch - self._job.first_epoch) / whole)
        outcome, stored = await self._placement.run_graph(
            lambda taken: self._graph_run(taken, last_epoch, steps),
            prepare=self._ingest,
            on_copy=self._enter_checkpointing,
            on_end=self._run_ended,
            is_wanted=lambda: not self._is_over,
            folder=f"checkpoints/{self._request.tenant_id}/{self._job.training_id}",
        )
        self._record_chunk(last_epoch, steps, outcome, stored)
        # Until the next chunk the server is free for others: what was trained is copied, and is not left there.
        await self._placement.clean_up()

    @property
    def _dataset(self) -> DatasetOrder:
        dataset = self._job.request.dataset
        assert dataset is not None
        return DatasetOrder(training_id=self._job.training_id, snapshot=dataset, list_sha256=self._job.list_sha256)

    async def _ingest(self, taken: ServerTaken) -> None:
        if self._fields["training_stage"] is None:
            self._enter(TrainingStage.DATA_INGEST, self._job.dataset_summary)
        workflow.upsert_memo({SERVER_MEMO: taken.server})
        is_told = workflow.patched("told-while-its-dataset-is-sent")
        ingesting = workflow.start_activity(
            INGEST_DATASET,
            self._dataset,
            result_type=int,
            task_queue=taken.task_queue,
            schedule_to_start_timeout=SERVER_AWAY,
            start_to_close_timeout=INGEST_WITHIN,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=STORE_RETRY,
            cancellation_type=ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            priority=self._priority,
            summary=f"put the dataset on {taken.server}",
        )
        try:
            if is_told:
                await self._placement.waited_for(ingesting, "waits until its dataset is on the server")
        except asyncio.CancelledError:
            # What it still sends must end before it is removed.
            await ingesting
            raise
        files: int = await ingesting
        if self._fields["training_stage"] == TrainingStage.DATA_INGEST:
            epochs = self._job.epochs - self._epoch
            text = f"{files} files ingested; training {self._job.request.base_model} for {epochs} epochs"
            self._enter(TrainingStage.TRAINING, text)

    def _graph_run(self, taken: ServerTaken, last_epoch: int, steps: int) -> GraphRun:
        if self._fields["training_status"] == TrainingStatus.CHECKPOINTING:
            self._fields["training_status"] = TrainingStatus.RUNNING.value
            self._change("running again")
        prefix = f"epoch-{last_epoch:04d}-r{self._placement.run}"
        folder = f"{LORA_FOLDER}/{self._job.training_id}"
        graph = self._job.graph
        return GraphRun(
            job_id=self._job.training_id,
            tenant_id=self._request.tenant_id,
            task_id=self._request.task_id,
            run=self._placement.run,
            prompt_id=self._placement.prompt_id(),
            graph=self._chunk_graph(steps, f"loras/{folder}/{prefix}", last_epoch),
            callback_url=self._request.callback_url,
            sequence_base=self._publishing.run_begins(),
            first_percent=self._placement.percent,
            tick_fields={**self._fields, "task_id": self._request.task_id},
            progress_from=self._progress_span[0],
            progress_to=self._progress_span[1],
            named_files=[
                ResultFile(
                    node=graph.save_node,
                    kind="loras",
                    filename=f"{prefix}_{self._step + steps}_steps_00001_.safetensors",
                    subfolder=f"loras/{folder}",
                )
            ],
            existing_lora=self._existing_lora(graph.existing_lora),
        )

    def _existing_lora(self, inputs: list[Ref]) -> ExistingLora | None:
        if self._latest is None:
            return None
        return ExistingLora(path=self._latest, name=self._latest.rpartition("/")[2], inputs=inputs)

    def _chunk_graph(self, steps: int, prefix: str, last_epoch: int) -> RenderedGraph:
        graph = self._job.graph
        nodes: dict[str, Any] = copy.deepcopy(graph.rendered.graph)
        digest = hashlib.sha256(f"{self._job.training_id}:{last_epoch}".encode()).digest()
        values: list[tuple[list[Ref], Any]] = [
            (graph.steps, steps),
            (graph.lora_prefix, prefix),
            (graph.folder, f"{LORA_FOLDER}/{self._job.training_id}"),
            (graph.existing_lora, "[None]"),
            (graph.seeds, int.from_bytes(digest[:6], "big")),
        ]
        for refs, value in values:
            for node, name in refs:
                nodes[node]["inputs"][name] = value
        seconds = max(1.0, steps * self._seconds_per_step())
        return graph.rendered.model_copy(update={"graph": nodes, "expected_seconds": seconds})

    def _expected_minutes(self, left_of_run: timedelta) -> float:
        later = (self._job.epochs - self._chunk_end) * self._job.steps_per_epoch * self._seconds_per_step()
        left = left_of_run + timedelta(seconds=later)
        return minutes(workflow.now() + left - self._started_at, at_least=2 * LEAST_MINUTES)

    def _enter_checkpointing(self) -> None:
        if not self._is_over:
            self._fields["training_status"] = TrainingStatus.CHECKPOINTING.value
            self._change("checkpointing")

    def _record_chunk(self, last_epoch: int, steps: int, outcome: GraphOutcome, stored: list[StoredResult]) -> None:
        """Record the end of a chunk: hours used and left, and the checkpoint for the next one."""
        if self._is_over:
            return
        self._hours += outcome.seconds / 3600
        self._trained_steps += steps
        self._epoch, self._step = last_epoch, self._step + steps
        self._latest, self._latest_sha256 = stored[0].path, stored[0].sha256
        self._loss = outcome.loss if outcome.loss is not None else self._loss
        left = timedelta(
            seconds=(self._job.epochs - self._epoch) * self._job.steps_per_epoch * self._seconds_per_step()
        )
        now = workflow.now()
        self._fields |= {
            "training_status": TrainingStatus.RUNNING.value,
            "stage_progress": round(self._progress_span[1], 2),
            "gpu_hours_used": round(self._hours, 6),
            "gpu_hours": round(self._hours + left.total_seconds() / 3600, 6),
            "estimated_time": minutes(now + left - self._started_at, at_least=2 * LEAST_MINUTES),
            "next_eta": instant(now + left),
            "checkpoint": {
                "uri": f"{self._job.checkpoint_root}/{self._latest}",
                "epoch": self._epoch,
                "step": self._step,
                "gpu_hours_used": round(self._hours, 6),
            },
        }
        loss = "" if outcome.loss is None else f" loss={outcome.loss:.4f}"
        self._log_line(f"epoch {self._epoch}/{self._job.epochs} step {self._step}{loss}; checkpoint written")

    def _seconds_per_step(self) -> float:
        if not self._trained_steps:
            return self._job.seconds_per_step
        return max(self._hours * 3600 / self._trained_steps, 0.001)

    async def _publish_model(self) -> None:
        self._enter(TrainingStage.PUBLISHING)
        assert self._latest is not None
        target = f"models/{self._request.tenant_id}/{self._job.training_id}.safetensors"
        address: str = await workflow.execute_activity(
            PUBLISH_MODEL,
            PublishOrder(source=self._latest, target=target),
            result_type=str,
            start_to_close_timeout=timedelta(minutes=30),
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
            retry_policy=STORE_RETRY,
            priority=self._priority,
            summary="publish the model",
        )
        if self._is_over:
            return
        checksum = {} if self._latest_sha256 is None else {"sha256": self._latest_sha256}
        metrics = {"steps": float(self._step)} | ({} if self._loss is None else {"loss": self._loss})
        self._fields |= {
            "training_status": TrainingStatus.COMPLETED.value,
            "stage_progress": 100.0,
            "next_eta": None,
            "gpu_hours": round(self._hours, 6),
            "estimated_time": minutes(workflow.now() - self._started_at),
            "output": {"model_path": address, "version": self._job.training_id, "metrics": metrics} | checksum,
        }
        self._log_line("model published")

    def _enter(self, stage: TrainingStage, message: str = "") -> None:
        if self._is_over:
            return
        self._fields |= {
            "training_status": TrainingStatus.RUNNING.value,
            "training_stage": stage.value,
            "stage_progress": 0.0,
        }
        self._log_line(message or f"{stage.value} begins")

    def _log_line(self, text: str) -> None:
        line = {"ts": instant(workflow.now()), "level": LogLevel.INFO.value, "message": text}
        self._change(self._stage(), log=[line])
