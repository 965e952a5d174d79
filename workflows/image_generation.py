"""Step table 1 (docs/architecture.md; contract §2, §4): one image task, from submission to settled credits."""

from __future__ import annotations

from temporalio import workflow

from comfyui_temporal.contracts.comfyui import JobAccepted, LoraFile
from comfyui_temporal.contracts.continuation import ImageRun, JobUpdate
from comfyui_temporal.contracts.tasks import ImageProgress, ImageResult, TaskStatus
from workflows.failures import TaskEnd
from workflows.guards import validated_input
from workflows.image_price import ImagePrice
from workflows.job_requests import image_job, lora_files
from workflows.job_routes import IMAGE_ROUTES
from workflows.task_flow import TaskFlow


@workflow.defn
class ImageGenerationWorkflow(TaskFlow[ImageRun, ImageResult]):
    """One image: price check, submit, agree on the price, hold, wait for the delivery, settle, record.

    The number at a call is its row. Every mechanism that a row names is made in `__init__`, here or in `TaskFlow`.
    """

    @workflow.init
    @validated_input
    def __init__(self, task: ImageRun) -> None:
        super().__init__(task, IMAGE_ROUTES)
        self.price = ImagePrice(task, self.limits, self.hold, self.record, self.price_state)
        self.following = self.following_with()

    @workflow.run
    async def run(self, task: ImageRun) -> ImageResult:
        # Row 6 runs in parallel: the writer records each event as soon as it is published.
        return await self.stop.uninterrupted(self.steps(), self.record.write_facts())

    async def steps(self) -> ImageResult:
        await self.accept(self.task.resolution.value)  # row 0
        try:
            delivery = await self.reach_delivery()  # rows 1 to 4
            cost = self.price.cost_of(delivery)
        except TaskEnd as end:  # any other exception is a bug or an eviction: nothing is undone
            outcome = await self.ending.give_back(end)  # row 5: cancel job and hold
        else:
            outcome = await self.ending.settle(delivery, cost)  # row 5: commit; from here nothing is undone
        return self.result_of(await self.ending.publish(outcome))  # row 6

    async def reach_delivery(self) -> JobUpdate:
        end = await (self.following.job_end() if self.is_continued else self.attempt())
        while not end.succeeded:
            await self.attempts.wait_to_retry(end)
            end = await self.attempt()
        await self.close_to_cancel()
        return end

    async def attempt(self) -> JobUpdate:
        loras = lora_files(self.task, self.models)
        table = self.price.table()
        await self.price.check_balance(n=self.attempts.number + 1)  # row 1: price check
        await self.attempts.covered()  # row 1: the hold of an attempt before
        job = await self.submit(loras)  # row 1
        cost = await self.price.agree(job, table, n=self.attempts.number)  # row 2
        await self.hold.cover(cost)  # row 3
        return await self.following.job_end()  # row 4

    async def submit(self, loras: list[LoraFile]) -> JobAccepted:
        start = self.clock.start()
        job = await self.attempts.submit(image_job(self.task, self.policy, loras))
        assert isinstance(job, JobAccepted)
        self.watch.follow(job.job_id, since=start)
        self.record.submitted(job.job_status.value)
        return job

    @workflow.query
    def progress(self) -> ImageProgress:
        """Stage, percentage and ETA (contract §8)."""
        return ImageProgress(**self.progress_fields())

    def result(self, status: TaskStatus) -> ImageResult:
        state = self.record.state
        return ImageResult(**self.result_fields(status), job_id=state.job_id, result_urls=state.result_urls)
