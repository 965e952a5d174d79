"""What the running system does, seen from outside: over the published ports, by the gateway's client and the ledger."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from io import BytesIO
from typing import Any, Final

import httpx
from PIL import Image

from activities.credits import CreditsClient
from activities.tokens import SignedTokens
from comfyui_temporal.client.http_tasks import HttpTasks
from comfyui_temporal.client.models import TaskOutcome
from comfyui_temporal.contracts.calls import CallFor
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.scenes import AnyTask
from comfyui_temporal.contracts.tasks import ImageTask, TaskStatus, TrainingTask
from doctor.books import check_books
from doctor.finding import Verdict
from local_stack.demo import TENANT
from proof.containers.project import BRIDGE, CODEC, PREFIX, SIMULATORS, STAND_IN_SERVER, Project, Seen
from proof.containers.report import Report, in_time, must
from proof.simulators.tokens import Tokens
from runtime.settings import Settings

USER: Final = "user-demo"
UP_SECONDS: Final = 180.0
READY_SECONDS: Final = 3.0
READY_TRIES: Final = 3
TASK_SECONDS: Final = 240.0
LOOK_SECONDS: Final = 0.1
SIDE_PIXELS: Final = 2048
"""Of a picture of resolution 4k."""
ONE_SHOT: Final = ("database-users", "temporal-schema", "temporal-namespace", "tables")


def check_first_start(project: Project, report: Report) -> bool:
    """From nothing to a stack that is healthy, and red wherever something is missing. Returns whether all is up."""

    def refused() -> str:
        empty = project.variables[f"{PREFIX}COMFYUI_URL"]
        project.write_variables(**{f"{PREFIX}COMFYUI_URL": ""})
        done = project.compose("config", "--quiet", check=False)
        project.write_variables(**{f"{PREFIX}COMFYUI_URL": empty})
        must(done.returncode != 0, "compose took it")
        must(f"set {PREFIX}COMFYUI_URL in deploy/compose.env" in done.stderr, done.stderr)
        return done.stderr.strip().rpartition(": ")[2]

    def red() -> str:
        began = time.monotonic()
        project.up()
        seen = project.until(
            lambda seen: seen.get("gateway", NOTHING).is_well and "ComfyUI" in seen["worker"].last_words,
            "a gateway that is healthy, and a worker that misses ComfyUI",
            within_seconds=UP_SECONDS,
        )
        must(not seen["worker"].is_well, "the worker is healthy while nothing that it needs exists")
        said = seen["worker"].last_words.replace("\n", "; ")
        return f"after {time.monotonic() - began:.0f} s the gateway is healthy and the worker is not: {said}"

    def green() -> str:
        began = time.monotonic()
        project.up(profiles=(SIMULATORS,), is_awaited=True)
        seen = project.until(_all_well, "all containers are healthy", within_seconds=UP_SECONDS)
        return f"{_counted(seen)} {time.monotonic() - began:.0f} s after `up`"

    def all_profiles() -> str:
        began = time.monotonic()
        project.up(profiles=(SIMULATORS, BRIDGE, CODEC))
        seen = project.until(_all_well, "all containers are healthy", within_seconds=UP_SECONDS)
        must("gpu-worker" in seen and "codec-server" in seen, f"there are only {sorted(seen)}")
        return f"{_counted(seen)} {time.monotonic() - began:.0f} s after `up`"

    def purged() -> str:
        logged = project.logs("purge")
        must("were deleted" in logged, logged[-300:])
        return logged.strip().splitlines()[-1].partition("| ")[2]

    report.check("compose refuses an address that is not set", refused)
    report.check("without ComfyUI the worker is red", red)
    report.check("with the simulators all is green", green)
    is_up = report.check("every profile is green", all_profiles)
    report.check("old tasks are purged", purged)
    return is_up


def check_start_times(project: Project, report: Report) -> None:
    for service, port, page in (("worker", 8192, "/startupz"), ("gateway", 8180, "/readyz")):
        started = partial(_started, project, service, f"{project.url(port)}{page}")
        report.check(f"{service}: from start to ready", started)


def _started(project: Project, service: str, url: str) -> str:
    """The best of a few tries: the machine may be busy with other work."""
    container, times = project.container(service), []
    for _ in range(READY_TRIES):
        project.engine.run("stop", container)
        project.engine.run("start", container)
        began = time.monotonic()
        with httpx.Client(timeout=2, trust_env=False) as http:
            while not _answers(http, url):
                must(time.monotonic() - began < UP_SECONDS, f"not ready within {UP_SECONDS:g} s")
                time.sleep(0.02)
        times.append(time.monotonic() - began)
    said = ", ".join(f"{seconds:.1f}" for seconds in times)
    worked = _processor_seconds(project, container)
    must(worked <= READY_SECONDS, f"{worked:.1f} s of processor time")
    return f"{said} s; {in_time(min(times), READY_SECONDS)} for the best; {worked:.1f} s of processor time"


def _processor_seconds(project: Project, container: str) -> float:
    """What its Python process has taken so far (proc(5): fields 14 and 15, in hundredths)."""
    stats = project.engine.run("exec", container, "sh", "-c", "cat /proc/[0-9]*/stat").stdout
    fields = [line.rpartition(")")[2].split() for line in stats.splitlines() if "(python" in line]
    return max(int(user) + int(system) for *_, user, system in (words[:13] for words in fields)) / 100


def _answers(http: httpx.Client, url: str) -> bool:
    try:
        return http.get(url).status_code == 200
    except httpx.TransportError:
        return False


class Outside:
    """A caller on the host, with the tokens of the demo's user."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self._run = secrets.token_hex(3)
        settings = Settings.model_fields
        audience, issuer = settings["caller_audience"].default, settings["caller_issuer"].default
        self._caller = Tokens(project.variables[f"{PREFIX}CALLER_SECRET"], issuer, audience)
        audience, issuer = settings["service_audience"].default, settings["service_issuer"].default
        self._service = SignedTokens(project.variables[f"{PREFIX}SERVICE_SECRET"], issuer, audience)
        self.outcomes: list[TaskOutcome] = []

    def tasks(self) -> HttpTasks:
        return HttpTasks(self._project.url(8180), lambda: self._caller.made_for(TENANT, USER))

    def image(self, name: str, template_id: str = "text-to-image") -> ImageTask:
        return ImageTask(
            task_id=f"containers-{self._run}-{name}-image",
            tenant_id=TENANT,
            user_id=USER,
            template_id=template_id,
            prompt="a lighthouse in a storm, oil on canvas",
            resolution="4k" if template_id == "text-to-image" else "sd",
        )

    def training(self, name: str) -> TrainingTask:
        return TrainingTask.model_validate(
            {
                "task_id": f"containers-{self._run}-{name}-training",
                "tenant_id": TENANT,
                "user_id": USER,
                "template_id": "lora-train",
                "dataset": {"dataset_id": "demo-cats", "source_uri": f"file:///datasets/{TENANT}/demo-cats/"},
                "hyperparameters": {"epochs": 4, "batch_size": 2, "learning_rate": 1e-4},
                "max_credits": 500,
            }
        )

    async def completed(
        self, *tasks: AnyTask, struck: Callable[[], Awaitable[None]] | None = None
    ) -> list[TaskOutcome]:
        """Start them; `struck` happens while all of them are at work. Returns how they ended: completed."""
        async with self.tasks() as client, asyncio.timeout(TASK_SECONDS):
            for task in tasks:
                await client.start(task)
            if struck is not None:
                for task in tasks:
                    await self._at_work(client, task.task_id)
                await struck()
            outcomes = await asyncio.gather(*(client.wait(task.task_id) for task in tasks))
        for outcome in outcomes:
            must(outcome.status is TaskStatus.COMPLETED, f"{outcome.task_id}: {outcome.code}: {outcome.sentence}")
        self.outcomes += outcomes
        return outcomes

    async def _at_work(self, client: HttpTasks, task_id: str) -> None:
        """Until its job runs: something would be lost."""
        while not (details := await client.show(task_id)).progress or not details.progress.progress:
            must(details.outcome is None, f"{task_id} ended before it could be struck: {details.outcome}")
            await asyncio.sleep(LOOK_SECONDS)

    async def opened(self, outcome: TaskOutcome) -> str:
        """Its pictures, fetched and decoded. Returns what they are."""
        must(outcome.result_urls, f"{outcome.task_id} has no result")
        said = []
        async with httpx.AsyncClient(timeout=20, trust_env=False) as http:
            for url in outcome.result_urls:
                answer = await http.get(url)
                must(answer.status_code == 200, f"{url}: status {answer.status_code}")
                with Image.open(BytesIO(answer.content)) as picture:
                    picture.load()
                    said.append(f"{picture.format} of {picture.width} × {picture.height}")
        return ", ".join(said)

    async def balanced(self) -> str:
        """Ledger and account agree with what the tasks say of their charges."""
        reported = {outcome.task_id: outcome.credits for outcome in self.outcomes if outcome.credits is not None}
        must(
            len(reported) == len(self.outcomes) > 0, f"{len(reported)} of {len(self.outcomes)} tasks name their charge"
        )
        call_for = CallFor(task_id="containers", tenant_id=TENANT, user_id=USER, scene=Scene.IMAGE_GENERATE)
        async with CreditsClient(self._project.url(8190), self._service) as credits_client:
            findings = await check_books(credits_client, call_for, reported)
        wrong = [finding for finding in findings if finding.verdict is not Verdict.OK]
        must(not wrong, str(wrong))
        points = sum(summary.charged or 0 for summary in reported.values())
        return f"{len(reported)} tasks, {points} points charged, {findings[0].says}"


def check_tasks(project: Project, report: Report, outside: Outside) -> None:
    """One image and one training; then the same under a SIGTERM and a SIGKILL."""

    async def both() -> str:
        image, training = await outside.completed(outside.image("first"), outside.training("first"))
        picture = await outside.opened(image)
        must(f"{SIDE_PIXELS} × {SIDE_PIXELS}" in picture, picture)
        must(training.result is not None and getattr(training.result, "output", None), "the training has no output")
        return f"image: {picture}; training: completed"

    async def stopped() -> None:
        for service in ("worker", "gateway"):
            await asyncio.to_thread(project.compose, "stop", service, profiles=(SIMULATORS,))
            seen = (await asyncio.to_thread(project.seen))[service]
            must(seen.exit_code == 0, f"{service} ended with {seen.exit_code}")
        await asyncio.to_thread(project.compose, "start", "gateway", "worker", profiles=(SIMULATORS,))

    async def killed() -> None:
        for service in ("worker", "gateway", "temporal", "postgres", "comfyui-simulator"):
            await asyncio.to_thread(project.compose, "kill", "--signal", "KILL", service, profiles=(SIMULATORS,))
            await asyncio.to_thread(project.compose, "start", service, profiles=(SIMULATORS,))

    async def struck(name: str, strike: Callable[[], Awaitable[None]]) -> str:
        image, _ = await outside.completed(outside.image(name), outside.training(name), struck=strike)
        return f"image: {await outside.opened(image)}; training: completed"

    _check(report, "one image and one training", both)
    _check(report, "worker and gateway are stopped with work in flight", lambda: struck("stopped", stopped))
    _check(report, "five services are killed with work in flight", lambda: struck("killed", killed))
    _check(report, "the ledger is balanced", outside.balanced)


def check_bridge(project: Project, report: Report, outside: Outside) -> None:
    """The bridge, with a ComfyUI server of the tests; afterwards tasks go there."""

    def redirected() -> str:
        project.write_variables(**{f"{PREFIX}COMFYUI_URL": "http://bridge:8195"})
        project.up(profiles=(SIMULATORS, BRIDGE, CODEC))
        return _counted(project.until(_all_well, "all containers are healthy", within_seconds=UP_SECONDS))

    async def through() -> str:
        [image] = await outside.completed(outside.image("bridged", "test-pattern"))
        return f"{await outside.opened(image)}, {await outside.balanced()}"

    def red() -> str:
        project.compose("kill", STAND_IN_SERVER, profiles=(BRIDGE,))
        deadline = time.monotonic() + UP_SECONDS
        while "cannot be used" not in (said := project.seen()["gpu-worker"].last_words):
            must(time.monotonic() < deadline, f"its check says: {said}")
            time.sleep(0.5)
        return said

    if report.check("tasks go to the bridge", redirected):
        _check(report, "one image through the bridge", through)
        report.check("without its server the GPU worker is red", red)


def check_end(project: Project, report: Report) -> None:
    """`stop` drains, `down` leaves nothing."""

    def stopped() -> str:
        began = time.monotonic()
        project.compose("stop", profiles=(SIMULATORS, BRIDGE, CODEC))
        seconds = time.monotonic() - began
        ended = {name: project.seen()[name].exit_code for name in ("worker", "gateway", "bridge", "gpu-worker")}
        must(set(ended.values()) == {0}, json.dumps(ended))
        return f"{', '.join(ended)} ended with 0 within {seconds:.0f} s"

    def gone() -> str:
        project.down()
        must(not project.left(), f"left: {project.left()}")
        return "no container, volume or network of it is left"

    report.check("stop ends every service cleanly", stopped)
    report.check("down leaves nothing", gone)


NOTHING: Final = Seen("", "missing", "", -1)


def _all_well(seen: dict[str, Seen]) -> bool:
    return bool(seen) and all(one.is_well for one in seen.values())


def _counted(seen: dict[str, Seen]) -> str:
    checked = [one for one in seen.values() if one.health == "healthy"]
    done = [one for one in seen.values() if one.state == "exited"]
    must(sorted(one.service for one in done) == sorted(ONE_SHOT), f"ended: {done}")
    return f"{len(checked)} services healthy, {len(done)} jobs done, {len(seen)} containers"


def _check(report: Report, name: str, look: Callable[[], Coroutine[Any, Any, str]]) -> bool:
    return report.check(name, lambda: asyncio.run(look()))
