"""The image flow as a versioned worker runs it: each run stays on the build that began it (decision 15).

A class of its own, because the behaviour belongs to the definition: from an unversioned worker the server refuses every
workflow task of a definition that names one, and the runs would be stuck. The commands are the same.
"""

from __future__ import annotations

from temporalio import workflow
from temporalio.common import VersioningBehavior

from comfyui_temporal.contracts.continuation import ImageRun
from comfyui_temporal.contracts.tasks import IMAGE_WORKFLOW, ImageResult
from workflows.image_generation import ImageGenerationWorkflow


@workflow.defn(name=IMAGE_WORKFLOW, versioning_behavior=VersioningBehavior.PINNED)
class PinnedImageGenerationWorkflow(ImageGenerationWorkflow):
    """An image lasts minutes: the build that began it can wait for it, and no other one ever replays it."""

    @workflow.run
    async def run(self, task: ImageRun) -> ImageResult:
        return await super().run(task)
