"""Step table 1 (contract §2, §4): one image task, from submission to settled credits."""

from __future__ import annotations

from temporalio import workflow

from comfyui_temporal.contracts.comfyui import JobAccepted, JobRequest, TaskPriority
from comfyui_temporal.contracts.continuation import ImageRun, JobUpdate
from comfyui_temporal.contracts.credits import EstimateRequest
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.prices import UnknownPrice
from comfyui_temporal.contracts.task_store import RecordedPrices
from comfyui_temporal.contracts.tasks import ImageProgress, ImageResult, TaskStatus
from workflows.failures import TaskEnd, TaskFailed
from workflows.guards import validated_input
from workflows.job_routes import IMAGE_ROUTES
from workflows.task_flow import TaskFlow


@workflow.defn
class ImageGenerationWorkflow(TaskFlow[ImageRun, ImageResult]):
    """One image: submit, agree on the price, hold, wait for delivery, settle, tell."""

    @workflow.init
    @validated_input
    def __init__(self, task: ImageRun) -> None:
        super().__init__(task, IMAGE_ROUTES)

    @workflow.run
    async def run(self, task: ImageRun) -> ImageResult:
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    async def steps(self) -> ImageResult:
        await self.accept(self.task.resolution.value)  # row 0
        try:
            delivery = await self.reach_delivery()  # rows 1 to 4
            cost = self.cost_of(delivery)
        except TaskEnd as end:  # anything else is a bug or an eviction: nothing is undone
            return await self.give_back(end)
        return await self.settle(delivery, cost)  # rows 5 and 6: from here nothing is undone

    async def reach_delivery(self) -> JobUpdate:
        end = await (self.following.job_end() if self.is_continued else self.attempt())
        while not end.succeeded:
            await self.attempts.wait_to_retry(end)
            end = await self.attempt()
        await self.delivered()
        return end

    async def attempt(self) -> JobUpdate:
        table = self.table_price()
        job = await self.submit()  # row 1
        cost = await self.agree(job, table)  # row 2
        await self.hold.cover(cost)  # row 3
        return await self.following.job_end()  # row 4

    async def submit(self) -> JobAccepted:
        task = self.task
        request = JobRequest(
            task_id=task.task_id,
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            template_id=task.template_id,
            prompt=task.prompt,
            controls=[control.model_dump(mode="json") for control in task.controls],
            resolution=task.resolution,
            priority=task.priority,
            extras=task.extras,
            callback_url=self.limits.callback_url,
        )
        self.clock.start()
        job = await self.attempts.submit(request)
        assert isinstance(job, JobAccepted)
        self.watch.follow(job.job_id)
        self.record.submitted(job.job_status.value)
        return job

    async def agree(self, job: JobAccepted, table: int) -> int:
        """Points to hold: the larger of the job's price and the estimate, never above the ceiling (contract §5)."""
        task = self.task
        request = EstimateRequest(
            tenant_id=task.tenant_id,
            user_id=task.user_id,
            template_id=task.template_id,
            scene=task.scene,
            resolution=task.resolution.value,
            priority=task.priority,
            extras=self.limits.prices.points_of_extras(task.extras),
        )
        estimate = await self.hold.estimate(request, n=self.attempts.number)
        self.price.job_estimate = job.estimated_cost
        self.record_prices(RecordedPrices(job=job.estimated_cost, estimate=estimate.selected_cost, table=table))
        cost = max(job.estimated_cost, estimate.selected_cost)
        ceiling = task.max_credits or round(self.limits.ceiling_factor * table)
        if cost > ceiling:
            raise TaskFailed(
                FailureCode.PRICE_MISMATCH,
                f"The job would cost {cost} points, more than the ceiling of {ceiling}; it was cancelled. "
                "Raise max_credits, or have the prices compared: all three are recorded on the task.",
            )
        return cost

    def table_price(self) -> int:
        """The table's price in points. Raises TaskFailed `input_invalid` for an extra that is not offered."""
        is_accelerated = self.task.priority is TaskPriority.ACCELERATED
        try:
            return self.limits.prices.image(
                resolution=self.task.resolution.value, accelerated=is_accelerated, extras=self.task.extras
            )
        except UnknownPrice as error:
            raise TaskFailed(FailureCode.INPUT_INVALID, f"The input is not valid: {error}.") from None

    def cost_of(self, delivery: JobUpdate) -> int:
        """Points to charge (contract §5 *Charged*). Raises TaskFailed `reply_invalid` for a negative cost."""
        asked = delivery.actual_cost if delivery.actual_cost is not None else self.price.job_estimate
        if asked < 0:
            raise TaskFailed(FailureCode.REPLY_INVALID, f"ComfyUI states a cost of {asked} points; nothing is charged.")
        usable = self.hold.usable
        if asked > usable:
            self.record.record_exception(
                "cost_above_hold",
                ExceptionCode.COST_ABOVE_HOLD,
                f"ComfyUI asks {asked} points, {usable} are held; no more than these are charged.",
                actual_cost=asked,
                held=usable,
            )
        return min(asked, usable)

    @workflow.query
    def progress(self) -> ImageProgress:
        """Stage, percentage and ETA (contract §8)."""
        return ImageProgress(**self.progress_fields())

    def result(self, status: TaskStatus) -> ImageResult:
        state = self.record.state
        return ImageResult(**self.result_fields(status), job_id=state.job_id, result_urls=state.result_urls)
