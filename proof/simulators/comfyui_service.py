"""What each ComfyUI route does (contract §2, §3). Every act runs inside one transaction and answers or refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from comfyui_temporal.contracts.comfyui import JobRequest, TaskPriority, TrainingRequest
from comfyui_temporal.contracts.errors import ErrorDetails, FailureCode
from comfyui_temporal.contracts.permissions import Operation
from comfyui_temporal.contracts.prices import PriceTable, UnknownPrice
from comfyui_temporal.contracts.tasks import Hyperparameters
from proof.simulators.admin_wire import JOB_KINDS, FaultKind, Parameters, RunAction, RunOrder
from proof.simulators.callbacks import Outbox
from proof.simulators.clock import Clock
from proof.simulators.edge import Call
from proof.simulators.faults import Faults, Occasion
from proof.simulators.gpu_queue import GpuQueue
from proof.simulators.jobs import IMAGE_POOL, IMAGE_TEMPLATES, ImageRun, new_job
from proof.simulators.replies import Refused, Reply, checked
from proof.simulators.runs import Run, Trouble
from proof.simulators.state_file import StateFile
from proof.simulators.template_list import listed
from proof.simulators.tokens import demand, demand_person
from proof.simulators.trainings import DEFAULT_GPU, TrainingRun, new_training

MODEL_HOST: Final = "models.example.org"
"""The only one whose models jobs may use by address."""
FIRST_GPUS: Final = {IMAGE_POOL: 8, DEFAULT_GPU: 2, "h100": 1}
_PREEMPTED = Parameters(
    code=FailureCode.GPU_PREEMPTED, message="The GPU was taken away by a job of higher rank.", retryable=True
)


class ComfyUIService:
    """Jobs and trainings behind `/comfyui/v1`."""

    def __init__(
        self,
        state: StateFile,
        clock: Clock,
        faults: Faults,
        *,
        folder: Path,
        prices: PriceTable,
        callback_secrets: list[str],
        gpus: dict[str, int] | None = None,
    ) -> None:
        self.state = state
        self.clock = clock
        self.folder = folder
        self._faults = faults
        self._prices = prices
        self.outbox = Outbox(state, clock, faults, callback_secrets)
        self.queue = GpuQueue(state, clock, self.outbox, folder, FIRST_GPUS if gpus is None else gpus)

    def submit_job(self, call: Call) -> Reply:
        demand(call.claims, Operation.CREATE_JOB)
        order = checked(JobRequest, call.body)
        demand_person(call.claims, order.tenant_id, order.user_id)
        _demand_address(order.callback_url, order.task_id)
        if order.template_id not in IMAGE_TEMPLATES:
            raise Refused("template_not_found")
        self._demand_models(order)
        cost = self._image_price(order)
        faults = self._decided("submit_job", order.task_id, order.tenant_id)
        if FaultKind.JOB_REFUSE in faults:
            return _refusal(faults[FaultKind.JOB_REFUSE])
        run = new_job(
            order,
            base_url=call.base_url,
            cost=cost,
            work=self.clock.work(),
            seconds=faults[FaultKind.JOB_DURATION].seconds if FaultKind.JOB_DURATION in faults else None,
        )
        _burden(run, faults)
        self.queue.add(run)
        self.queue.enqueue(run)
        shown = self.queue.observe(run)
        names = ("job_id", "job_status", "estimated_time", "gpu_slots")
        return _lied_reply({name: shown[name] for name in names} | {"estimated_cost": cost}, faults)

    def get_job(self, call: Call) -> Reply:
        demand(call.claims, Operation.READ_COMFYUI)
        return self._state_of(self._own(call, ImageRun))

    def cancel_job(self, call: Call) -> Reply:
        demand(call.claims, Operation.CANCEL_JOB)
        run = self._own(call, ImageRun)
        self.queue.cancel(run)
        return self._state_of(run)

    def create_training(self, call: Call) -> Reply:
        demand(call.claims, Operation.CREATE_TRAINING)
        order = checked(TrainingRequest, call.body)
        demand_person(call.claims, order.tenant_id, order.user_id)
        _demand_address(order.callback_url, order.task_id)
        self._demand_trainable(order)
        faults = self._decided("create_training", order.task_id, order.tenant_id)
        if FaultKind.JOB_REFUSE in faults:
            return _refusal(faults[FaultKind.JOB_REFUSE])
        run = new_training(
            order,
            base_url=call.base_url,
            gpu_type=order.gpu_type or DEFAULT_GPU,
            first_epoch=self._epoch_of(order),
            work=self.clock.work(),
            seconds=faults[FaultKind.JOB_DURATION].seconds if FaultKind.JOB_DURATION in faults else None,
        )
        _burden(run, faults)
        self.queue.add(run)
        # A server without `start` has nothing to wait for (contract §2).
        if self._faults.covers(FaultKind.NOT_OFFERED, "start_training") or run.is_instant:
            self.queue.enqueue(run)
        shown = self.queue.observe(run)
        names = ("training_id", "training_status", "estimated_time", "gpu_hours", "gpu_slots", "gpu_type")
        return _lied_reply({name: shown[name] for name in names}, faults)

    def start_training(self, call: Call) -> Reply:
        demand(call.claims, Operation.START_TRAINING)
        run = self._own(call, TrainingRun)
        if run.phase == "idle":
            self.queue.enqueue(run)
        return self._state_of(run)

    def get_training(self, call: Call) -> Reply:
        demand(call.claims, Operation.READ_COMFYUI)
        return self._state_of(self._own(call, TrainingRun))

    def cancel_training(self, call: Call) -> Reply:
        demand(call.claims, Operation.CANCEL_JOB)
        run = self._own(call, TrainingRun)
        self.queue.cancel(run)
        return self._state_of(run)

    def list_gpus(self, call: Call) -> Reply:
        demand(call.claims, Operation.READ_COMFYUI)
        return Reply(200, [self._gpu(gpu_type, total) for gpu_type, total in self.queue.gpus.items() if total])

    def list_templates(self, call: Call) -> Reply:
        demand(call.claims, Operation.READ_COMFYUI)
        return Reply(200, listed(self._prices, self.queue.gpus))

    def _gpu(self, gpu_type: str, total: int) -> dict[str, Any]:
        wait = self.queue.wait_of_new(gpu_type, TaskPriority.ACCELERATED)
        return {
            "gpu_type": gpu_type,
            "total": total,
            "available": self.queue.available(gpu_type),
            "accelerated_wait": round(wait / self.clock.speed / 60, 6),
        }

    def act_on(self, run: Run, order: RunOrder) -> None:
        """An admin's order about one run; an ended run does not change."""
        self.queue.settle()
        held = self.queue.find(run.run_id)
        assert held is not None
        given = order.parameters
        if order.action is RunAction.RESUME:
            self.queue.resume(held)
        elif order.action is RunAction.FINISH:
            self.queue.finish_now(held)
        elif order.action is RunAction.PREEMPT:
            self.queue.apply_now(held, Trouble(kind="fail", parameters=_PREEMPTED))
        elif order.action is RunAction.FAIL:
            self.queue.apply_now(held, Trouble(kind="fail", parameters=given))
        elif order.action is RunAction.STALL:
            self.queue.apply_now(held, Trouble(kind="stall", parameters=given))
        elif order.action is RunAction.FORGET:
            self.queue.forget(held)
        elif order.action is RunAction.LIE:
            self.queue.apply_now(held, Trouble(kind="lie", parameters=given))
        else:
            self.queue.apply_now(held, Trouble(kind="gpu_hours", parameters=given))

    def _own(self, call: Call, kind: type[ImageRun] | type[TrainingRun]) -> Any:
        """The run in the path, when it is of this kind and of the token's tenant. Raises Refused (404)."""
        run = self.queue.find(call.request.path_params["run_id"])
        if not isinstance(run, kind) or run.phase == "forgotten" or run.tenant_id != call.claims.tenant_id:
            raise Refused("job_not_found" if kind is ImageRun else "training_not_found")
        return run

    def _state_of(self, run: ImageRun | TrainingRun) -> Reply:
        return Reply(200, self.queue.observe(run))

    def _image_price(self, order: JobRequest) -> int:
        is_accelerated = order.priority is TaskPriority.ACCELERATED
        try:
            return self._prices.image(
                resolution=order.resolution,
                accelerated=is_accelerated,
                extras=order.extras,
                loras=len(order.loras or []),
                images=order.images or 1,
            )
        except UnknownPrice as error:
            raise Refused("payload_invalid", fields=[str(error)]) from None

    def _demand_trainable(self, order: TrainingRequest) -> None:
        try:
            checked(Hyperparameters, order.hyperparameters)
        except Refused as refusal:
            raise Refused("payload_invalid", fields=[f"hyperparameters.{line}" for line in refusal.fields]) from None
        if order.base_model not in self._prices.base_models:
            raise Refused("payload_invalid", fields=[f"base_model: {order.base_model!r} is not offered"])
        if not self.queue.gpus.get(order.gpu_type or DEFAULT_GPU):
            raise Refused("payload_invalid", fields=[f"gpu_type: no {order.gpu_type or DEFAULT_GPU!r} here"])

    def _demand_models(self, order: JobRequest) -> None:
        """Raises Refused for a model that no training of the tenant has made, and for a host that is not allowed."""
        if not order.loras:
            return  # all runs are read below, which takes half a second once there are ten thousand
        of_tenant = {
            (run.output or {}).get("model_path")
            for run in self.queue.all_runs()
            if isinstance(run, TrainingRun) and run.tenant_id == order.tenant_id
        }
        for number, lora in enumerate(order.loras):
            field = f"loras.{number}.model_path"
            if lora.model_path.startswith("https://"):
                if not lora.model_path.startswith(f"https://{MODEL_HOST}/") or lora.sha256 is None:
                    raise Refused("payload_invalid", fields=[f"{field}: is on a host that is not allowed"])
            elif lora.model_path not in of_tenant:
                raise Refused("payload_invalid", fields=[f"{field}: is not the address of a model of this tenant"])

    def _epoch_of(self, order: TrainingRequest) -> int:
        """The epoch to resume after. A checkpoint that is not this tenant's or not ours is refused."""
        if order.resume_from is None:
            return 0
        for run in self.queue.all_runs():
            if isinstance(run, TrainingRun) and run.tenant_id == order.tenant_id and order.resume_from in run.written:
                return run.written[order.resume_from]
        raise Refused("payload_invalid", fields=["resume_from: no such checkpoint"])

    def _decided(self, route: str, task_id: str, tenant_id: str) -> dict[FaultKind, Parameters]:
        """The faults that are set for a new run."""
        hits = self._faults.hit(Occasion(route, "POST", task_id, tenant_id), JOB_KINDS)
        return {fault.kind: fault.parameters for fault in hits}


def _refusal(given: Parameters) -> Reply:
    # Returned, not raised, so that the counted hit stays counted.
    details = ErrorDetails(code=given.code, message=given.message, retryable=given.retryable, node=given.node)
    return Refused("job_refused", error_details=details).reply()


def _burden(run: Run, faults: dict[FaultKind, Parameters]) -> None:
    """Set the faults that a new run will have."""
    for kind, name in (
        (FaultKind.JOB_FAIL, "fail"),
        (FaultKind.JOB_STALL, "stall"),
        (FaultKind.JOB_FORGET, "forget"),
        (FaultKind.JOB_GPU_HOURS, "gpu_hours"),
        (FaultKind.JOB_LIE, "lie"),
    ):
        if kind in faults:
            run.troubles.append(Trouble.model_validate({"kind": name, "parameters": faults[kind]}))
    if given := faults.get(FaultKind.JOB_PREEMPT):
        parameters = _PREEMPTED.model_copy(update={"at": given.at, "while_queued": given.while_queued})
        run.troubles.append(Trouble(kind="fail", parameters=parameters))
    run.is_instant = FaultKind.JOB_INSTANT in faults
    if given := faults.get(FaultKind.JOB_SLOW):
        run.slow_factor = given.factor


def _lied_reply(body: dict[str, Any], faults: dict[FaultKind, Parameters]) -> Reply:
    lie = faults.get(FaultKind.JOB_LIE)
    return Reply(202, body | lie.reply if lie else body)


def _demand_address(url: str, task_id: str) -> None:
    """Raises Refused unless the address is this task's at some gateway: which gateways there are is not known here."""
    parts = urlsplit(url)
    own = f"/callbacks/comfyui/{task_id}"
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise Refused("payload_invalid", fields=["callback_url: must be an http or https address"])
    if "?" in url or "#" in url or not parts.path.endswith(own):
        raise Refused("payload_invalid", fields=[f"callback_url: must end with {own}"])
