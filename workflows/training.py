"""Step table 2 (docs/architecture.md; contract §3, §4): one training task, from its GPU window to settled credits."""

from __future__ import annotations

from temporalio import workflow

from activities.comfyui import ComfyUIActivities
from comfyui_temporal.contracts.calls import JobCall
from comfyui_temporal.contracts.comfyui import TrainingAccepted
from comfyui_temporal.contracts.continuation import Continuation, JobUpdate, TrainingRun
from comfyui_temporal.contracts.errors import ExceptionCode
from comfyui_temporal.contracts.tasks import (
    CONFIRM_SIGNAL,
    ConfirmPrice,
    ConfirmPriceOutcome,
    TaskStatus,
    TrainingProgress,
    TrainingResult,
)
from workflows.failures import TaskEnd, TaskFailed
from workflows.gpu_window import Window, check_gpus
from workflows.guards import any_payload, validated_input
from workflows.job_requests import training_draft
from workflows.job_routes import TRAINING_ROUTES
from workflows.task_flow import TaskFlow
from workflows.training_dataset import TrainingDataset
from workflows.training_price import TrainingPrice


@workflow.defn
class TrainingWorkflow(TaskFlow[TrainingRun, TrainingResult]):
    """One training: window, GPUs, balance, snapshot, create, estimate, confirm, hold, start, follow, record, settle.

    The number at a call is its row. Every mechanism that a row names is made in `__init__`, here or in `TaskFlow`.
    """

    @workflow.init
    @validated_input
    def __init__(self, task: TrainingRun) -> None:
        super().__init__(task, TRAINING_ROUTES)
        self.window = Window(task.window, self.waits)
        self.dataset = TrainingDataset(
            task, self.outside, self.stop, self.window, (task.carried or Continuation()).dataset
        )
        self.price = TrainingPrice(task, self.limits, self.hold, self.record, self.waits, self.price_state)
        # The price comes before the hold: if it ends the task, the hold is not renewed.
        self.following = self.following_with(self.price)

    @workflow.run
    async def run(self, task: TrainingRun) -> TrainingResult:
        # Row 5 runs in parallel: the writer records each event as soon as it is published.
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    async def steps(self) -> TrainingResult:
        await self.accept(self.task.base_model)  # row 0
        try:
            delivery = await self.reach_delivery()  # rows 0 to 5
        except TaskEnd as end:  # any other exception is a bug or an eviction: nothing is undone
            outcome = await self.ending.give_back(end)  # row 6: cancel job and hold
        else:
            cost = self.price.cost_of(delivery)
            outcome = await self.ending.settle(delivery, cost)  # row 6: commit; from here nothing is undone
        return self.result_of(await self.ending.publish(outcome))  # row 5: the end; row 6: delete the snapshot

    async def reach_delivery(self) -> JobUpdate:
        end = await (self.following.job_end() if self.is_continued else self.first_attempt())
        while not end.succeeded:
            await self.attempts.wait_to_retry(end)
            self.price.resume_from_checkpoint()
            end = await self.attempt()
        await self.close_to_cancel()
        return end

    async def first_attempt(self) -> JobUpdate:
        self.outside.earlier.raise_if_ended()
        self.price.check_base_model()
        self.dataset.check_addresses(self.policy)
        await self.window.opens()  # row 0
        if not await check_gpus(self.outside, self.task.gpu_type):  # row 0
            self.record_missing("gpus", "ComfyUI does not list its GPUs: none was looked for before the training.")
        await self.price.check_balance()  # row 0: price check
        self.record.dataset_copied(await self.dataset.snapshot())  # row 0
        return await self.attempt()

    async def attempt(self) -> JobUpdate:
        training = await self.create()  # rows 1 and 2: the answer is `queued`, time, GPU hours
        quote = await self.price.agree(n=self.attempts.number)  # row 3: estimate
        cost = await self.price.confirmed(quote, self.window.closes)  # row 3: confirm
        await self.hold.cover(cost)  # row 3: pre-deduct
        await self.start(training)  # row 3: start
        return await self.following.job_end()  # row 4: states and stages; row 5: the price follows the GPU hours

    async def create(self) -> TrainingAccepted:
        draft = training_draft(
            self.task, self.policy, dataset=self.dataset.copied, resume_from=self.price.state.resume_from
        )
        self.clock.not_started()
        training = await self.attempts.submit(draft)
        assert isinstance(training, TrainingAccepted)
        self.price.created(training.gpu_hours, training.dataset_summary)
        self.watch.follow(training.training_id)
        self.record.submitted(None)
        return training

    async def start(self, training: TrainingAccepted) -> None:
        """Begin the work: credits are held. A server without this route starts by itself (contract §2)."""
        self.window.check()
        call = JobCall(
            call_for=self.outside.call_for,
            job_id=training.training_id,
            key=self.outside.key("start", self.attempts.key_number),
        )
        start = self.clock.start()
        try:
            answer = await self.outside.setup(
                ComfyUIActivities.start_training,
                call,
                summary="3 start",
                until=self.window.closes,
                again=self.may_start_again,
            )
        except TaskFailed as failure:
            self.window.end_of_start(failure)
            raise
        if answer.refusal is not None:
            raise TaskFailed.by_refusal(answer.refusal)
        if answer.not_offered:
            self.record_missing("start", "ComfyUI has no start route: a training begins by itself.")
        self.watch.started(start)

    async def may_start_again(self) -> None:
        """Look at window and hold once more: the store or our workers were away meanwhile, perhaps for hours."""
        if workflow.patched("window-and-hold-looked-at-before-each-start"):
            self.window.check()
            await self.waits.covered()

    def record_missing(self, route: str, message: str) -> None:
        """Record a route that the server does not offer; the store keeps one record of each (contract §2)."""
        if workflow.patched("each-missing-route-recorded"):
            self.record.record_exception(f"route_not_offered:{route}", ExceptionCode.ROUTE_NOT_OFFERED, message)

    @workflow.signal(name=CONFIRM_SIGNAL)
    @any_payload
    def confirm_by_signal(self, payload: bytes | None) -> None:
        """The update `confirm_price` without an answer, for callers that are workflows (contract §8)."""
        order = self.ordered(payload, ConfirmPrice)
        if order is not None:
            self.price.raise_ceiling(order.max_credits)

    @workflow.update
    def confirm_price(self, request: ConfirmPrice) -> ConfirmPriceOutcome:
        """Confirm a price up to `max_credits` points. At any time before the end; it only ever raises the ceiling."""
        return ConfirmPriceOutcome(max_credits=self.price.raise_ceiling(request.max_credits))

    @confirm_price.validator
    def refuse_bad_confirmation(self, request: ConfirmPrice) -> None:
        """Reached only with one valid argument: anything else is refused before it (pitfall 3)."""

    @workflow.query
    def progress(self) -> TrainingProgress:
        """Stage, percentage, ETA, and the price that waits to be confirmed (contract §8)."""
        wanted = self.record.state.confirmation
        return TrainingProgress(**self.progress_fields(), confirmation=wanted and wanted.shown())

    def job_updated(self, update: JobUpdate) -> None:
        super().job_updated(update)
        self.price.job_updated(update)

    async def clean_up(self) -> None:
        await self.dataset.delete()

    def argument_of_next_run(self, carried: Continuation) -> TrainingRun:
        """Without the list of files: the snapshot's manifest holds it by now (pitfall 39)."""
        carried = carried.model_copy(update={"dataset": self.dataset.carry()})
        dataset = self.task.dataset.model_copy(update={"files": None})
        return self.task.model_copy(update={"carried": carried, "dataset": dataset})

    def result(self, status: TaskStatus) -> TrainingResult:
        state = self.record.state
        return TrainingResult(**self.result_fields(status), training_id=state.job_id, output=state.output)
