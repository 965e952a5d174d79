"""One compose project: a copy of our files in a folder of its own, with its own ports, secrets and name."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import time
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import yaml

from local_stack.dataset import make_dataset
from local_stack.demo import TENANT
from local_stack.folder import PROJECT
from local_stack.ports import LOOPBACK, any_free_port
from proof.containers import stand_ins
from proof.containers.debian_engine import open_files
from proof.containers.engine import MINUTES, CannotRun, CommandFailed, Engine

COMPOSE_FILE: Final = PROJECT / "docker-compose.yml"
DOCKERFILE: Final = PROJECT / "Dockerfile"
PREFIX: Final = "COMFYUI_TEMPORAL_"
SPEED: Final = 60
"""An image takes 3 to 8 s, a training about 50 s: long enough to be struck, short enough to wait for."""
STAND_IN_SERVER: Final = "comfyui-stand-in"
"""A ComfyUI server for the bridge: the tests' own."""
SIMULATORS, BRIDGE, CODEC = "simulators", "bridge", "codec"
BUILD_SECONDS: Final = 15 * MINUTES


@dataclass(frozen=True)
class Seen:
    """One container: `state` is the engine's word, `health` empty without a check."""

    service: str
    state: str
    health: str
    exit_code: int
    last_words: str = ""

    @property
    def is_well(self) -> bool:
        if self.state == "exited":
            return self.exit_code == 0
        return self.state == "running" and self.health in ("", "healthy")


class Project:
    """`folder` is the project's own and holds nothing else."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self._folder = folder
        self._name = f"comfyui-temporal-{secrets.token_hex(4)}"
        self.file: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
        self._ports = {port: any_free_port() for port in self._published()}
        self.variables = self._first_variables()

    # Before it runs

    def write(self) -> None:
        """The files, and a dataset of the demo's tenant."""
        (self._folder / "deploy").mkdir(parents=True)
        shutil.copyfile(COMPOSE_FILE, self._folder / COMPOSE_FILE.name)
        for file in (PROJECT / "deploy").iterdir():
            # A developer's own settings and secrets stay out.
            if file.is_file() and file.suffix != ".env":
                shutil.copyfile(file, self._folder / "deploy" / file.name)
        (self._folder / "override.yml").write_text(self._override())
        make_dataset(self._folder / "datasets" / TENANT / "demo-cats")
        self.write_variables()

    def write_variables(self, **changed: str) -> None:
        """`deploy/compose.env`; `changed` stay so."""
        self.variables |= changed
        lines = [f"{name}={value}\n" for name, value in self.variables.items()]
        (self._folder / "deploy" / "compose.env").write_text("".join(lines))

    def fetch(self) -> None:
        """The images that our files name, from a registry. Raises CannotRun where none answers."""
        for image in [] if self.engine.stand_ins else [_base(), *sorted(self._others())]:
            done = self.engine.run("pull", "--quiet", image, check=False, within_seconds=BUILD_SECONDS)
            # A registry that answers and does not know the name or digest is an error in our files.
            if done.returncode != 0 and not re.search("not found|manifest unknown", done.stderr):
                raise CannotRun(f"{self.engine.name} reaches no registry: {done.stderr.strip()[-300:]}")

    def build(self, folder: Path) -> None:
        """Our images; on an engine without a registry also those that the files name. Raises CommandFailed."""
        base = _base()
        arguments: list[str] = []
        if self.engine.stand_ins:
            stand_ins.make_python_base(self.engine, base, folder)
            images = {stand_ins.stage_of(image): image for image in self._others()}
            stand_ins.make_others(self.engine, base, images, folder)
            # Its build reaches the package index as this machine does.
            arguments = ["--network", "host", "--build-arg", f"PYTHON_IMAGE={stand_ins.without_digest(base)}"]
        for image, target in self.our_images().items():
            words = ["build", *arguments, "--target", target, "--tag", image, str(PROJECT)]
            self.engine.run(*words, within_seconds=BUILD_SECONDS)

    # While it runs

    def compose(
        self, *words: str, profiles: Iterable[str] = (), within_seconds: float = 5 * MINUTES, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Raises CommandFailed."""
        chosen = [word for profile in profiles for word in ("--profile", profile)]
        files = ["--file", COMPOSE_FILE.name, "--file", "override.yml", "--env-file", "deploy/compose.env"]
        return self.engine.run(
            *("compose", "--project-name", self._name, *files, *chosen, *words),
            within_seconds=within_seconds,
            check=check,
            cwd=self._folder,
        )

    def up(self, *, profiles: Iterable[str] = (), is_awaited: bool = False) -> None:
        """Start; `is_awaited`: until compose says that all is healthy. Raises CommandFailed."""
        self.compose("up", "--detach", "--no-build", *(["--wait"] if is_awaited else []), profiles=profiles)

    def seen(self) -> dict[str, Seen]:
        """Every container, by its service."""
        ids = self.compose("ps", "--all", "--quiet", profiles=(SIMULATORS, BRIDGE, CODEC)).stdout.split()
        if not ids:
            return {}
        found = json.loads(self.engine.run("inspect", *ids).stdout)
        return {seen.service: seen for seen in map(_seen, found)}

    def until(self, are: Callable[[dict[str, Seen]], bool], what: str, *, within_seconds: float) -> dict[str, Seen]:
        """The containers once they are so. Raises CommandFailed."""
        deadline = time.monotonic() + within_seconds
        while not are(seen := self.seen()):
            if time.monotonic() > deadline:
                unwell = [f"{one.service} {one.state} {one.health} {one.last_words}" for one in seen.values()]
                raise CommandFailed(f"not within {within_seconds:g} s: {what}; there are: {'; '.join(sorted(unwell))}")
            time.sleep(0.5)
        return seen

    def url(self, port: int) -> str:
        """Where the host reaches what the file publishes as `port`."""
        return f"http://{LOOPBACK}:{self._ports[port]}"

    def container(self, service: str) -> str:
        return self.compose("ps", "--all", "--quiet", service, profiles=(SIMULATORS, BRIDGE)).stdout.strip()

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-color", *services, profiles=(SIMULATORS, BRIDGE, CODEC), check=False).stdout

    def down(self) -> None:
        """Containers, networks and volumes go; images stay. Raises CommandFailed."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5", profiles=(SIMULATORS, BRIDGE, CODEC))

    def left(self) -> list[str]:
        """What there still is of this project."""
        label = f"label=com.docker.compose.project={self._name}"
        kinds = (("ps", "--all"), ("volume", "ls"), ("network", "ls"))
        return [line for kind in kinds for line in self.engine.run(*kind, "--quiet", "--filter", label).stdout.split()]

    # Its files

    @cached_property
    def _services(self) -> dict[str, dict[str, Any]]:
        services: dict[str, dict[str, Any]] = self.file["services"]
        return services

    def _others(self) -> set[str]:
        """Images that are not built here."""
        return {service["image"] for service in self._services.values() if "build" not in service}

    def our_images(self) -> dict[str, str]:
        """Image → stage of the Dockerfile."""
        return {one["image"]: one["build"]["target"] for one in self._services.values() if "build" in one}

    def image_of(self, service: str) -> str:
        image: str = self._services[service]["image"]
        return image

    def _published(self) -> list[int]:
        ports = [port for service in self._services.values() for port in service.get("ports", [])]
        return [int(port.split(":")[1]) for port in ports]

    def _override(self) -> str:
        """Ports that are free here; where there is no registry, images without digests and a name server."""
        lines = ["services:"]
        for name, service in self._services.items():
            lines.append(f"  {name}:")
            lines.append(f"    labels: [proof.containers={self._name}]")
            if self.engine.stand_ins:
                lines.append(f"    image: {stand_ins.without_digest(service['image'])}")
            if self.engine.name_server:
                lines.append(f"    dns: [{self.engine.name_server}]")
            if self.engine.stand_ins and "ulimits" in service:
                lines.append(f"    ulimits: {{nofile: {open_files()}}}")
            if "ports" in service:
                published = [port.split(":") for port in service["ports"]]
                listed = ", ".join(f'"{LOOPBACK}:{self._ports[int(host)]}:{inside}"' for _, host, inside in published)
                lines.append(f"    ports: !override [{listed}]")
        return "\n".join([*lines, *self._stand_in_server(), ""])

    def _stand_in_server(self) -> list[str]:
        simulators = self.image_of("comfyui-simulator")
        options = ["--host", "0.0.0.0", "--port", "8188", "--folder", "/tmp/server"]  # noqa: S104, S108
        command = ["python", "-m", "tests.bridge.native", *options]
        return [
            f"  {STAND_IN_SERVER}:",
            f"    image: {simulators}",
            f"    profiles: [{BRIDGE}]",
            f"    command: {json.dumps(command)}",
            *([f"    dns: [{self.engine.name_server}]"] if self.engine.name_server else []),
            "    volumes:",
            *(f"      - {PROJECT / room}:/app/{room}:ro" for room in ("tests", "local_stack")),
        ]

    def _first_variables(self) -> dict[str, str]:
        """What deploy/compose.env.example asks for, and addresses of this project's own ports."""
        example = (PROJECT / "deploy" / "compose.env.example").read_text()
        demanded = re.findall(r"^(\w+)=$", example, re.MULTILINE)
        given = {name: secrets.token_hex(32) for name in demanded}
        ours = {
            "CALLBACK_SECRETS": f"whsec_{b64encode(secrets.token_bytes(32)).decode()}",
            "COMFYUI_URL": "http://comfyui-simulator:8188",
            "CREDITS_URL": "http://credits-simulator:8190",
            "SIMULATOR_SPEED": str(SPEED),
            "SIMULATOR_PUBLIC_URL": self.url(8188),
            "GATEWAY_PUBLIC_URL": self.url(8180),
            "BRIDGE_URL": self.url(8195),
            "CODEC_SERVER_TOKEN": secrets.token_hex(32),
            "ENCRYPTION_KEYS": f"k1:{b64encode(secrets.token_bytes(32)).decode()}",
        }
        return (
            given
            | {PREFIX + name: value for name, value in ours.items()}
            | {"COMFYUI_SERVER": f"http://{STAND_IN_SERVER}:8188"}
        )


def _base() -> str:
    """The Dockerfile's."""
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return str(base)


def _seen(container: dict[str, Any]) -> Seen:
    state = container["State"]
    health = state.get("Health") or {}
    checks = health.get("Log") or [{}]
    return Seen(
        service=container["Config"]["Labels"]["com.docker.compose.service"],
        state=state["Status"],
        health=health.get("Status", ""),
        exit_code=state["ExitCode"],
        last_words=str(checks[-1].get("Output", "")).strip()[-300:],
    )
