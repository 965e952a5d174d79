"""Step table 2 (contract §3, §4): one training task, from its GPU window to settled credits."""

from __future__ import annotations

from temporalio import workflow

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.calls import GpuQuestion, JobCall
from comfyui_temporal.contracts.comfyui import TrainingAccepted, TrainingDraft
from comfyui_temporal.contracts.continuation import Continuation, JobUpdate, TrainingRun
from comfyui_temporal.contracts.credits import EstimateRequest
from comfyui_temporal.contracts.errors import FailureCode
from comfyui_temporal.contracts.task_store import RecordedPrices
from comfyui_temporal.contracts.tasks import (
    ConfirmPrice,
    ConfirmPriceOutcome,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
)
from workflows.failures import TaskEnd, TaskFailed
from workflows.guards import validated_input
from workflows.job_routes import TRAINING_ROUTES
from workflows.task_flow import TaskFlow
from workflows.training_dataset import TrainingDataset
from workflows.training_price import TrainingPrice


@workflow.defn
class TrainingWorkflow(TaskFlow[TrainingRun, TrainingResult]):
    """One training: window, GPUs, snapshot, create, estimate, confirm, hold, start, follow, settle, tell."""

    @workflow.init
    @validated_input
    def __init__(self, task: TrainingRun) -> None:
        super().__init__(task, TRAINING_ROUTES)
        self.training_price = TrainingPrice(task, self.price, self.record, self.hold, self.waiting)
        self.concerns.insert(0, self.training_price)  # before the hold: a task that it ends renews nothing
        self.watch.on_news(self.training_price.on_news)
        self.dataset = TrainingDataset(task, self.outside, self.stop, (task.carried or Continuation()).dataset)

    @workflow.run
    async def run(self, task: TrainingRun) -> TrainingResult:
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    async def steps(self) -> TrainingResult:
        policy = await self.accept(self.task.base_model)  # row 0
        self.training_price.configure(policy, self.task.options)
        try:
            delivery = await self.reach_delivery()  # rows 0 to 5
        except TaskEnd as end:  # anything else is a bug or an eviction: nothing is undone
            return await self.give_back(end)
        return await self.settle(delivery, self.training_price.cost_of(delivery))  # row 6: nothing is undone

    async def reach_delivery(self) -> JobUpdate:
        if self.is_continued:
            end = await self.following.job_end()
        else:
            await self.wait_for_window()
            await self.check_gpus()
            await self.snapshot_dataset()
            end = await self.attempt()
        while not end.succeeded:
            await self.attempts.wait_to_retry(end)
            self.training_price.resume()
            end = await self.attempt()
        await self.delivered()
        return end

    async def attempt(self) -> JobUpdate:
        training = await self.create()  # rows 1 and 2
        cost = await self.agree(training)  # row 3: estimate, confirm
        await self.hold.cover(cost)
        await self.start(training)
        return await self.following.job_end()  # rows 4 and 5

    async def wait_for_window(self) -> None:
        """Wait for the GPU scheduling window; check first what needs no waiting."""
        self.outside.earlier.raise_if_ended()
        self.training_price.of(0)
        self.check_addresses()
        opens = self.task.window.not_before if self.task.window else None
        self.check_window()
        if opens is not None:
            await self.waiting.until(lambda: workflow.now() >= opens, at=opens, summary="0 window: wait until it opens")

    def check_window(self) -> None:
        """Raise TaskFailed `gpu_unavailable` past the window: `start` must meet it (contract §1)."""
        closes = self.task.window.not_after if self.task.window else None
        if closes is not None and workflow.now() > closes:
            raise TaskFailed(
                FailureCode.GPU_UNAVAILABLE, f"The GPU window closed at {closes.isoformat()} before the training began."
            )

    def check_addresses(self) -> None:
        """Dataset and checkpoint lie under the tenant's own prefix, or the task ends `input_invalid` (contract §8)."""
        dataset = self.task.dataset
        if dataset.names_files_twice:
            raise TaskFailed(
                FailureCode.INPUT_INVALID,
                "The input is not valid: dataset: files and manifest exclude each other: name the files in one way.",
            )
        named = {
            "dataset.source_uri": dataset.source_uri,
            "dataset.manifest.uri": dataset.manifest.uri if dataset.manifest else None,
            "resume_from": self.task.resume_from,
        }
        for field, uri in named.items():
            if uri is not None and not self.limits.is_own_address(uri):
                raise TaskFailed(
                    FailureCode.INPUT_INVALID,
                    f"The input is not valid: {field}: must lie under one of {', '.join(self.limits.dataset_roots)}.",
                )

    async def check_gpus(self) -> None:
        """No GPU of the asked type at all is an error before anything starts; none free only lengthens the ETA."""
        answer = await self.outside.read(
            ComfyUIActivities.list_gpus,
            GpuQuestion(**self.outside.call_for.model_dump(), gpu_type=self.task.gpu_type),
            summary="0 check GPUs",
            minutes=self.limits.opening_call_minutes,
        )
        if answer.refusal is not None:
            raise TaskFailed.by_refusal(answer.refusal)
        if answer.reply is None:
            return  # the server does not tell
        wanted = [pool for pool in answer.reply if self.task.gpu_type in (None, pool.gpu_type)]
        if not any(pool.total > 0 for pool in wanted):
            raise TaskFailed(
                FailureCode.GPU_UNAVAILABLE,
                f"ComfyUI has no GPU of type {self.task.gpu_type}." if self.task.gpu_type else "ComfyUI has no GPU.",
            )

    async def snapshot_dataset(self) -> None:
        closes = self.task.window.not_after if self.task.window else None
        self.record.state.dataset = await self.dataset.snapshot(closes, self.check_window)

    async def create(self) -> TrainingAccepted:
        task = self.task
        request = TrainingDraft(
            task_id=task.task_id,
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            base_model=task.base_model,
            dataset=self.dataset.copied,
            hyperparameters=task.hyperparameters.model_dump(mode="json"),
            priority=task.priority,
            gpu_type=task.gpu_type,
            resume_from=self.price.resume_from or task.resume_from,
            callback_url=self.limits.callback_url,
        )
        self.clock.not_started()
        training = await self.attempts.submit(request)
        assert isinstance(training, TrainingAccepted)
        self.price.gpu_hours = training.gpu_hours
        self.watch.follow(training.training_id)
        self.record.submitted(None)
        return training

    async def agree(self, training: TrainingAccepted) -> int:
        """Points to hold, confirmed by `max_credits` or `confirm_price` (contract §5)."""
        task = self.task
        request = EstimateRequest(
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            template_id=task.template_id,
            scene=task.scene,
            resolution=task.base_model,
            priority=task.priority,
            gpu_hours=self.training_price.expected_gpu_hours,
        )
        estimate = await self.hold.estimate(request, n=self.attempts.number)
        table = self.training_price.of(self.training_price.expected_gpu_hours)
        self.record_prices(RecordedPrices(estimate=estimate.selected_cost, table=table))
        cost = self.training_price.asked(estimate.selected_cost, table)
        not_after = self.task.window.not_after if self.task.window else None
        await self.training_price.confirmed(cost, estimate, not_after)
        return cost

    async def start(self, training: TrainingAccepted) -> None:
        """Begin the work: credits are held. A server without this route starts by itself (contract §2)."""
        self.check_window()
        call = JobCall(
            call_for=self.outside.call_for,
            job_id=training.training_id,
            key=self.outside.key("start", self.attempts.key_number),
        )
        self.clock.start()
        answer = await self.outside.setup(
            ComfyUIActivities.start_training, call, summary="3 start", minutes=self.limits.opening_call_minutes
        )
        if answer.refusal is not None:
            raise TaskFailed.by_refusal(answer.refusal)
        self.watch.started()

    @workflow.update
    def confirm_price(self, request: ConfirmPrice) -> ConfirmPriceOutcome:
        """Confirm a price up to `max_credits` points; at any time before the end, raises only."""
        return ConfirmPriceOutcome(max_credits=self.training_price.raise_ceiling(request.max_credits))

    @confirm_price.validator
    def refuse_bad_confirmation(self, request: ConfirmPrice) -> None:
        """Reached only with one good argument: anything else is refused before it (pitfall 3)."""

    @workflow.query
    def progress(self) -> TrainingProgress:
        """Stage, percentage, ETA, and what is waited to be confirmed (contract §8)."""
        return TrainingProgress(**self.progress_fields(), confirmation=self.record.state.confirmation)

    async def clean_up(self) -> None:
        await self.dataset.delete()

    def continuation(self, carried: Continuation) -> TrainingRun:
        """The list of files stays behind: it stands in the snapshot's manifest by now (pitfall 39)."""
        carried = carried.model_copy(update={"dataset": self.dataset.carry()})
        dataset = self.task.dataset.model_copy(update={"files": None})
        return self.task.model_copy(update={"carried": carried, "dataset": dataset})

    def result(self, status: TaskStatus) -> TrainingResult:
        state = self.record.state
        return TrainingResult(**self.result_fields(status), training_id=state.job_id, output=state.output)
