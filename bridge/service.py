"""The actions behind the image routes of `/comfyui/v1` (contract §2, §3). They keep no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Final

import structlog
from pydantic import Field, JsonValue
from temporalio.service import RPCError

from bridge.calls import CANCEL_UPDATE, JOB_WORKFLOW, run_id_of, workflow_id
from bridge.control_images import ControlImages, address_of
from bridge.forecast import CanRun, Forecast
from bridge.lora_files import LoraFiles
from bridge.orders import ImageJob, JobView, RenderedGraph
from bridge.replies import Call, Refused, Reply, Unanswered, checked
from bridge.runs import NewRun, Runs, fingerprint
from bridge.server_check import no_server
from bridge.template_library import TemplateLibrary
from bridge.template_list import listed
from bridge.templates import RequestRefused
from comfyui_temporal.contracts.comfyui import JobRequest, JobStatus, LoraFile, TaskPriority
from comfyui_temporal.contracts.fields import CallerId, Prompt, Sha256
from comfyui_temporal.contracts.permissions import Scene, TokenClaims
from comfyui_temporal.contracts.prices import PriceTable, UnknownPrice
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.size_budget import MAX_IMAGES, MAX_LORAS
from comfyui_temporal.contracts.tasks import Extras

GPU_SLOTS: Final = 1
log = structlog.get_logger(__name__)


class TakenLora(LoraFile):
    """A LoRA as accepted from a caller."""

    model_path: Annotated[str, Field(min_length=1, max_length=2048)]
    sha256: Sha256 | None = None
    strength: Annotated[float, Field(ge=0, le=2)]


class TakenJobRequest(JobRequest):
    """The request as accepted from a caller. Its ids must be usable in workflow ids and fairness keys."""

    task_id: CallerId
    tenant_id: CallerId
    user_id: CallerId
    template_id: CallerId
    prompt: Prompt
    controls: Annotated[list[dict[str, JsonValue]], Field(max_length=16)] = []
    extras: Extras = {}
    loras: Annotated[list[TakenLora], Field(max_length=MAX_LORAS)] | None = None  # type: ignore[assignment]
    images: Annotated[int, Field(ge=1, le=MAX_IMAGES, strict=True)] | None = None
    callback_url: Annotated[str, Field(max_length=2048)]


class ImageService:
    """Image jobs. Callbacks go only to the job's own task at one of the `callback_bases` (`check_callback`)."""

    def __init__(
        self,
        runs: Runs,
        forecast: Forecast,
        templates: TemplateLibrary,
        images: ControlImages,
        prices: PriceTable,
        callback_bases: Sequence[str],
        models: LoraFiles,
    ) -> None:
        self._runs = runs
        self._forecast = forecast
        self._templates = templates
        self._images = images
        self._prices = prices
        self._callback_bases = tuple(callback_bases)
        self._models = models

    async def submit(self, call: Call) -> Reply:
        request = checked(TakenJobRequest, call.body)
        require_user(call.claims, request.tenant_id, request.user_id)
        job = await self._new_job(request, call)
        answer = {
            "job_id": job.job_id,
            "job_status": JobStatus.QUEUED.value,
            "estimated_time": job.estimated_time,
            "gpu_slots": job.gpu_slots,
            "estimated_cost": job.estimated_cost,
        }
        new = NewRun(
            workflow=JOB_WORKFLOW,
            workflow_id=workflow_id(call.claims.tenant_id, call.key),
            kind="job",
            argument=job,
            answer=answer,
            fingerprint=fingerprint(call.path, call.body),
            task_id=request.task_id,
            tenant_id=request.tenant_id,
            user_id=request.user_id,
            scene=Scene.IMAGE_GENERATE,
            template_id=request.template_id,
            priority=request.priority,
        )
        return await self._runs.begin(new)

    async def get(self, call: Call) -> Reply:
        tenant_id = call.claims.tenant_id
        view = await self._runs.view(call.run_id, kind="job", tenant_id=tenant_id, moved=self._ahead_of)
        return Reply(200, view)

    async def _ahead_of(self, view: JobView) -> int | None:
        """An upper limit of the jobs ahead of a queued job, perhaps counting itself. None if the job is not queued."""
        if view.fields.get("job_status") != JobStatus.QUEUED or not view.fields.get("queue_position"):
            return None
        return (await self._forecast.backlog(view.pool)).ahead_of(view.priority)

    async def cancel(self, call: Call) -> Reply:
        view = await self._runs.update(
            call.run_id, CANCEL_UPDATE, call.key, kind="job", tenant_id=call.claims.tenant_id
        )
        return Reply(200, view)

    async def gpus(self, call: Call) -> Reply:
        default = SCENES[Scene.IMAGE_GENERATE].eta_minutes[TaskPriority.ACCELERATED]
        with servers_known():
            return Reply(200, await self._forecast.gpus(default * 60))

    async def templates(self, call: Call) -> Reply:
        """Every template, with its prices, and how many servers can run it."""
        return Reply(200, listed(self._templates, self._prices, await self._forecast.servers()))

    async def _new_job(self, request: TakenJobRequest, call: Call) -> ImageJob:
        """Check the request: everything that can be refused is refused here, before anything is queued."""
        template = self._templates.get(request.template_id, Scene.IMAGE_GENERATE)
        if template is None:
            raise Refused("template_not_found")
        check_callback(request.callback_url, self._callback_bases, request.task_id)
        job_id = run_id_of("job", request.tenant_id, call.key)
        try:
            rendered = template.render(request, job_id=job_id)
        except RequestRefused as refused:
            raise Refused("payload_invalid", fields=refused.fields) from None
        await self._check_files(request, rendered)
        loras = await self._models.stored(request.loras or [], request.tenant_id)
        can_run = await self._forecast.can_run(rendered.pool, request.template_id)
        demand_runnable(can_run, request.template_id)
        expected = await self._forecast.of_image(
            template_id=request.template_id,
            resolution=request.resolution,
            priority=request.priority,
            pool=rendered.pool,
            by_manifest=rendered.expected_seconds,
        )
        return ImageJob(
            job_id=job_id,
            request=request,
            graph=rendered.model_copy(update={"expected_seconds": max(0.1, expected.run_seconds), "loras": loras}),
            estimated_cost=self._price(request),
            estimated_time=expected.minutes,
            gpu_slots=GPU_SLOTS,
            queue_position=expected.ahead,
            manifest_seconds=rendered.expected_seconds,
            is_for_some=not can_run.by_all,
        )

    async def _check_files(self, request: TakenJobRequest, rendered: RenderedGraph) -> None:
        """Raises Refused for a file that cannot be used, as far as that is known before it is fetched."""
        named = {f"controls.{number}.image_url": address_of(each) for number, each in enumerate(request.controls)}
        named |= {f"extras.{file.name}": file.address for file in rendered.files}
        problems = []
        for field, address in named.items():
            problem = self._images.problem(address, request.tenant_id)
            problem = problem or await self._images.missing(address, request.tenant_id)
            problems += [f"{field}: {problem}"] if problem else []
        if problems:
            raise Refused("payload_invalid", fields=problems)

    def _price(self, request: JobRequest) -> int:
        is_accelerated = request.priority is TaskPriority.ACCELERATED
        try:
            return self._prices.image(
                resolution=request.resolution.value,
                accelerated=is_accelerated,
                extras=request.extras,
                loras=len(request.loras or []),
                images=request.images or 1,
            )
        except UnknownPrice as error:
            raise Refused("payload_invalid", fields=[str(error)]) from None


@contextmanager
def servers_known() -> Iterator[None]:
    """Raises Unanswered where Temporal does not say which servers there are."""
    try:
        yield
    except (RPCError, TimeoutError) as error:
        log.warning("servers_unknown", reason=type(error).__name__)
        raise Unanswered(503, "Temporal does not say now which servers there are") from None


def demand_runnable(can_run: CanRun, template_id: str) -> None:
    """Raises Refused with the names of what is missing, if no server of the pool can run the template."""
    details = no_server(can_run, template_id)
    if details is not None:
        raise Refused("job_refused", error_details=details)


def check_callback(url: str, bases: Sequence[str], task_id: str) -> None:
    """Raises Refused unless the callback address is exactly this task's at one of the gateways (contract §2)."""
    own = [f"{base.rstrip('/')}/callbacks/comfyui/{task_id}" for base in bases]
    if url not in own:
        raise Refused("payload_invalid", fields=[f"callback_url: must be {' or '.join(own)}"])


def require_user(claims: TokenClaims, tenant_id: str, user_id: str) -> None:
    """Raises Refused if the body names another tenant or user than the token."""
    if (claims.tenant_id, claims.user_id) != (tenant_id, user_id):
        raise Refused("authorization_missing")
