"""`python -m bridge`: serves `/comfyui/v1` (contract §2, §3) and runs the worker of the bridge's workflows.

`python -m bridge templates`: prints the templates, with inputs, prices, and which server can run which of them.
`python -m bridge template new FROM_EXPORTED.json`: makes a template of a graph that was exported from ComfyUI.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Response
from temporalio.client import Client
from temporalio.common import MetricMeter
from temporalio.worker import Worker

from bridge.allowed_hosts import AllowedHosts
from bridge.api import Edge, bridge_app
from bridge.callbacks import CallbackActivities, CallbackSender
from bridge.control_images import ControlImages
from bridge.forecast import Forecast
from bridge.gpu_worker import open_server
from bridge.job_activities import JobActivities
from bridge.job_workflow import ComfyUIJobWorkflow
from bridge.key_workflow import ComfyUIKeyWorkflow, ComfyUIServerWorkflow
from bridge.lora_files import REDIRECTS, LoraFiles
from bridge.new_template import read_exported, template_from, write
from bridge.pool_gauges import PoolGauges
from bridge.required_settings import callback_secret_by, result_secret_by, template_folders_by, templates_by
from bridge.runs import Keys, Runs
from bridge.server import ServerError
from bridge.server_check import ServerCheck
from bridge.service import ImageService
from bridge.storage import SignedAddresses, Storage
from bridge.template_list import lines_of, listed, servers_of
from bridge.template_watch import TemplateWatch
from bridge.templates import TemplateProblem
from bridge.training_service import TrainingService
from bridge.training_workflow import ComfyUITrainingWorkflow
from comfyui_temporal.process_end import end_process
from runtime import temporal_connection
from runtime.door_limits import Door
from runtime.doors import DoorConfig, door_limits_by
from runtime.health_page import is_polling
from runtime.logs import configure_logs
from runtime.metrics_page import metrics_runtime
from runtime.required_settings import CannotStart, read_settings, service_tokens_by
from runtime.settings import Settings
from runtime.tracing import traced_process

WORKFLOWS = (ComfyUIJobWorkflow, ComfyUITrainingWorkflow, ComfyUIKeyWorkflow, ComfyUIServerWorkflow)
GRACE_SECONDS = 10
STICKY = timedelta(seconds=2.5)

log = structlog.get_logger("bridge")


class Bridge:
    """The parts of one bridge process. Raises CannotStart, and ValueError for an unusable address or secret."""

    def __init__(self, settings: Settings, client: Client) -> None:
        self._tokens = service_tokens_by(settings)
        self.storage = Storage(settings.bridge_store_url)
        base_url = settings.bridge_url or f"http://{settings.bridge_host}:{settings.bridge_port}"
        self.signed = SignedAddresses(base_url, result_secret_by(settings))
        uploads = settings.uploads_url
        self.images = ControlImages(
            hosts=AllowedHosts(settings.bridge_image_hosts),
            roots=settings.bridge_image_roots,
            uploads=None if uploads is None else Storage(uploads, setting="UPLOADS_URL"),
            max_file_bytes=settings.upload_max_bytes,
        )
        self.lora_hosts = AllowedHosts(settings.bridge_lora_hosts, redirects=REDIRECTS)
        self.loras = LoraFiles(self.storage, self.lora_hosts, limit_bytes=settings.bridge_lora_cache_bytes)
        self.sender = CallbackSender(callback_secret_by(settings))
        self.forecast = Forecast(client, task_queue=settings.bridge_task_queue)
        self._client = client
        self._settings = settings
        self._templates = templates_by(settings)

    def app(self) -> FastAPI:
        """The ASGI application."""
        settings = self._settings
        runs = Runs(self._client, task_queue=settings.bridge_task_queue)
        callback_bases = settings.bridge_callback_urls or [settings.callback_base_url]
        images = ImageService(
            runs,
            self.forecast,
            self._templates,
            self.images,
            settings.prices,
            callback_bases,
            self.loras,
        )
        trainings = TrainingService(
            runs,
            self.forecast,
            self._templates,
            self.storage,
            settings.prices,
            callback_bases=callback_bases,
            snapshots_url=settings.object_store_url,
        )
        app = bridge_app(Edge(self._tokens, Keys(runs)), images, trainings, self.storage, self.signed)

        @app.get("/readyz", include_in_schema=False)
        async def readyz(response: Response) -> dict[str, list[str]]:
            """Temporal sees this process poll for the bridge's own work; without it no request is answered."""
            queue = settings.bridge_task_queue
            polls = await is_polling(self._client, queue, self._client.identity)
            response.status_code = 200 if polls else 503
            return {"missing": [] if polls else [f"Temporal does not see this bridge at task queue {queue}"]}

        return app

    def template_watch(self) -> TemplateWatch:
        """Reads the templates again when their files change."""
        return TemplateWatch(self._templates, template_folders_by(self._settings))

    def pool_gauges(self, meter: MetricMeter) -> PoolGauges:
        """What its metrics page says of the pools."""
        return PoolGauges(meter, self.forecast, {template.manifest.pool for template in self._templates})

    def worker(self) -> Worker:
        """The worker of the bridge's own queue."""
        by_bridge = self._settings.bridge_result_addresses == "bridge"
        jobs = JobActivities(self.storage, self.images, self.loras, self.signed, signs_itself=by_bridge)
        return Worker(
            self._client,
            task_queue=self._settings.bridge_task_queue,
            workflows=WORKFLOWS,
            activities=[
                CallbackActivities(self.sender).send_callback,
                jobs.fetch_controls,
                jobs.fetch_models,
                jobs.sign_results,
                jobs.clear_up,
                jobs.publish_model,
                ServerCheck(self.forecast).check_servers,
            ],
            max_concurrent_workflow_tasks=self._settings.max_workflow_tasks,
            max_cached_workflows=self._settings.max_cached_workflows,
            sticky_queue_schedule_to_start_timeout=STICKY,
            graceful_shutdown_timeout=timedelta(seconds=GRACE_SECONDS),
        )


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises CannotStart."""
    async with AsyncExitStack() as opened:
        try:
            runtime = metrics_runtime(settings.bridge_host, settings.bridge_metrics_port, setting="BRIDGE_METRICS_PORT")
            client = await temporal_connection.connect(settings, runtime=runtime)
            await temporal_connection.check_namespace(client)
            bridge = Bridge(settings, client)
        except (ValueError, RuntimeError) as error:
            raise CannotStart(str(error)) from None
        await opened.enter_async_context(bridge.sender)
        await opened.enter_async_context(bridge.worker())
        await opened.enter_async_context(bridge.template_watch().watched())
        if runtime is not None:
            await opened.enter_async_context(bridge.pool_gauges(runtime.metric_meter).shown())
        server = uvicorn.Server(
            DoorConfig(
                bridge.app(),
                Door(door_limits_by(settings)),
                host=settings.bridge_host,
                port=settings.bridge_port,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        log.info("bridge_serves", host=settings.bridge_host, port=settings.bridge_port, namespace=client.namespace)
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn raises the signal again after draining; without a handler that would end us before clean-up.
            signal.signal(number, lambda *_: None)
        await server.serve()


async def print_templates(settings: Settings, *, as_json: bool) -> None:
    """Print every template. Raises CannotStart."""
    templates = templates_by(settings)
    try:
        client = await temporal_connection.connect(settings)
        await temporal_connection.check_namespace(client)
    except (ValueError, RuntimeError) as error:
        raise CannotStart(str(error)) from None
    servers = await Forecast(client, task_queue=settings.bridge_task_queue).servers()
    rows = listed(templates, settings.prices, servers)
    by_id = {template.template_id: servers_of(template, servers) for template in templates}
    for row in rows:
        row["servers"] = by_id[row["template_id"]]
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return
    for row in rows:
        sys.stdout.write("\n".join(lines_of(row)) + "\n")


def make_template(settings: Settings, options: argparse.Namespace) -> None:
    """Write a template, and say what is left to do. Raises CannotStart."""
    exported: Path = options.exported
    folders = [folder.resolve() for folder in settings.bridge_templates]
    out: Path = options.out or (folders[0] if folders else Path())
    try:
        graph = read_exported(exported)
        info = asyncio.run(_node_types(settings, options.comfyui)) if options.comfyui else None
        new = template_from(graph, exported.name, template_id=options.id, results=options.result, info=info)
        folder = write(new, out)
    except TemplateProblem as problem:
        raise CannotStart(f"{problem}. Nothing was written.") from None
    lines = [f"Wrote {folder}: graph.json and manifest.toml. The manifest is a first version: read it."]
    if new.replaces_a_shipped_one:
        lines.append(f"It takes the place of the shipped template {new.template_id}.")
    for said, sentences in (
        ("Left to decide, each a comment in the manifest:", new.decisions),
        ("This server would refuse it as it is:", new.refused_by(info) if info else []),
    ):
        lines += [said, *(f"  - {sentence}" for sentence in sentences)] if sentences else []
    lines += _next_steps(out, is_read=out.resolve() in folders, has_server=info is not None)
    sys.stdout.write("\n".join(lines) + "\n")


def _next_steps(out: Path, *, is_read: bool, has_server: bool) -> list[str]:
    steps = []
    if not is_read:
        steps.append(f"Have bridge and GPU workers read it: COMFYUI_TEMPORAL_BRIDGE_TEMPLATES={out.resolve()}")
    if not has_server:
        steps.append("See what a server would refuse: python -m bridge.gpu_worker --server http://… --check")
    return [*steps, "The credits service must know the template (docs/recipes.md)."]


async def _node_types(settings: Settings, url: str) -> Mapping[str, Any]:
    """A server's `/object_info`. Raises CannotStart."""
    try:
        async with open_server(url, settings) as server:
            return await server.node_types()
    except (ServerError, ValueError) as error:
        raise CannotStart(f"{error}. Nothing was written.") from None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bridge", description="Serve /comfyui/v1.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    templates = commands.add_parser("templates", help="print the templates, and which server can run which")
    templates.add_argument("--json", action="store_true", help="print JSON")
    template = commands.add_parser("template", help="make a template").add_subparsers(metavar="COMMAND", required=True)
    new = template.add_parser("new", help="make one of a graph that was exported from ComfyUI (API format)")
    new.add_argument("exported", type=Path, metavar="FROM_EXPORTED.json", help="by Workflow → Export (API)")
    new.add_argument("--id", help="the template_id, and its folder's name; default: made of the file's name")
    new.add_argument(
        "--out", type=Path, help="where its folder goes; default: the first of BRIDGE_TEMPLATES, else here"
    )
    new.add_argument("--comfyui", metavar="URL", help="ask this server about its nodes and models")
    new.add_argument(
        "--result", action="append", default=[], metavar="NODE", help="its files are a result; default: all that save"
    )
    return parser.parse_args()


def main() -> int:
    options = _options()
    try:
        settings = read_settings()
        if options.command == "templates":
            asyncio.run(print_templates(settings, as_json=options.json))
            return 0
        if options.command == "template":
            make_template(settings, options)
            return 0
        configure_logs(level=settings.log_level, as_json=settings.log_json, hidden=settings.hidden_values)
        with traced_process("bridge", is_on=settings.traces):
            asyncio.run(serve(settings))
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    end_process(main())
