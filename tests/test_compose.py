"""Checks of docker-compose.yml and Dockerfile without a container engine; neither file was run."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, TASK_QUEUE
from local_stack.parts import SECRETS_OF
from local_stack.temporal_server import DYNAMIC_CONFIG, RETENTION, dynamic_config, temporal_binary
from runtime.settings import SECRETS, Settings

PROJECT = Path(__file__).parent.parent
PREFIX = "COMFYUI_TEMPORAL_"
OTHERS_VARIABLES = {
    "postgres": {"POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB"},
    "database-user": {"PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD", "SERVICES_DATABASE_PASSWORD"},
    "temporal-schema": {"DB", "DB_PORT", "POSTGRES_SEEDS", "POSTGRES_USER", "POSTGRES_PWD", "SQL_PASSWORD"},
    "temporal": {
        *("DB", "DB_PORT", "POSTGRES_SEEDS", "POSTGRES_USER", "POSTGRES_PWD", "BIND_ON_IP"),
        "DYNAMIC_CONFIG_FILE_PATH",
    },
    "temporal-namespace": {"TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "RETENTION", "SEARCH_ATTRIBUTES"},
    "temporal-ui": {"TEMPORAL_ADDRESS"},
}
OURS = ("tables", "worker", "gateway", "comfyui-simulator", "credits-simulator", "bridge", "gpu-worker")
ALTERNATIVES = {"SERVICE_TOKEN", "STREAM_TOKEN_SECRET", "BRIDGE_RESULT_SECRET"}
"""A secret that the service is given serves in their place."""
SECRET = "0123456789abcdef0123456789abcdef"
FILLED_IN = {
    "POSTGRES_PASSWORD": "p",
    "SERVICES_DATABASE_PASSWORD": "s",
    f"{PREFIX}CALLER_SECRET": SECRET,
    f"{PREFIX}SERVICE_SECRET": SECRET[::-1],
    f"{PREFIX}CALLBACK_SECRETS": "whsec_MDEyMzQ1Njc4OWFiY2RlZg==",
    f"{PREFIX}SIMULATOR_ADMIN_TOKEN": SECRET * 2,
    f"{PREFIX}CODEC_SERVER_TOKEN": SECRET * 3,
}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[?-])(?P<text>[^}]*))?\}")


@cache
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    return loaded


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def interpolated(text: str) -> str:
    """As compose does it, with deploy/compose.env filled in by `FILLED_IN`."""

    def value(match: re.Match[str]) -> str:
        default = match["text"] if match["kind"] == "-" else None
        found = FILLED_IN.get(match["name"], default)
        assert found is not None, f"{match['name']} is neither in compose.env.example nor has it a default"
        return found

    return VARIABLE.sub(value, text)


def settings_of(service: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the service's process would read."""
    for name, value in services()[service]["environment"].items():
        monkeypatch.setenv(name, interpolated(value))
    return Settings(_env_file=None)


def test_every_image_is_pinned_and_temporals_match_the_local_server() -> None:
    printed = subprocess.run([temporal_binary(), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"Server ([\d.]+), UI ([\d.]+)", printed)
    assert version is not None
    images = {service["image"] for service in services().values()}
    for image in images:
        assert re.fullmatch(r"[\w/-]+:\d+\.\d+[\w.-]*", image), image
    assert {image for image in images if image.startswith("temporalio/")} == {
        f"temporalio/server:{version[1]}",
        f"temporalio/admin-tools:{version[1]}",
        f"temporalio/ui:{version[2]}",
    }
    base = re.search(r"^FROM (\S+)$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert re.fullmatch(r"python:3\.\d+\.\d+-[\w-]+", base[1])


def test_every_published_port_is_on_the_loopback_and_once() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    host_ports = [port.split(":")[1] for port in published]
    assert len(set(host_ports)) == len(host_ports)


def test_every_variable_is_known_to_the_service_that_gets_it() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(services()) == {*OTHERS_VARIABLES, *OURS, "codec-server"}
    for name, service in services().items():
        allowed = OTHERS_VARIABLES.get(name, known)
        assert set(service["environment"]) <= allowed, name
        assert all(isinstance(value, str) for value in service["environment"].values()), name


def test_every_variable_that_must_be_given_is_in_the_example_file() -> None:
    text = (PROJECT / "docker-compose.yml").read_text()
    example = (PROJECT / "deploy" / "compose.env.example").read_text()
    offered = set(re.findall(r"^(?:# )?(\w+)=", example, re.MULTILINE))
    demanded = {match["name"] for match in VARIABLE.finditer(text) if match["kind"] == "?"}
    assert demanded <= offered
    assert set(FILLED_IN) <= offered


@pytest.mark.parametrize("service", OURS)
def test_our_services_read_valid_settings(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(service, monkeypatch)
    assert settings.task_queue == TASK_QUEUE
    assert settings.temporal_address == "temporal:7233"
    if settings.database_dsn is not None:
        assert settings.database_dsn.get_secret_value().endswith("@postgres:5432/comfyui_temporal")
    assert settings.dataset_roots == ["file:///data/datasets/{tenant_id}/"]


@pytest.mark.parametrize("service", [*OURS, "codec-server"])
def test_a_service_gets_the_secrets_that_it_reads_and_no_others(service: str) -> None:
    given = {name.removeprefix(PREFIX) for name in services()[service]["environment"]} & {s.upper() for s in SECRETS}
    assert given == SECRETS_OF[service] - ALTERNATIVES


@pytest.mark.parametrize("service", OURS)
def test_every_command_names_a_program_that_exists(service: str) -> None:
    python, *command = services()[service]["command"]
    assert python == "python"
    if command[0] == "-m":
        program = importlib.util.find_spec(command[1])
        assert program is not None
        is_package = program.submodule_search_locations is not None
        assert not is_package or importlib.util.find_spec(f"{command[1]}.__main__") is not None
    else:
        assert (PROJECT / command[0]).is_file()


def test_services_listen_where_others_look_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = settings_of("worker", monkeypatch)
    gateway = settings_of("gateway", monkeypatch)
    comfyui = settings_of("comfyui-simulator", monkeypatch)
    listens = {
        "worker": {worker.health_port, worker.metrics_port},
        "gateway": {gateway.gateway_port},
        "comfyui-simulator": {comfyui.comfyui_simulator_port},
        "credits-simulator": {comfyui.credits_simulator_port},
        "bridge": {settings_of("bridge", monkeypatch).bridge_port},
        "codec-server": {settings_of("codec-server", monkeypatch).codec_server_port},
    }
    for name, ports in listens.items():
        assert {int(port.split(":")[2]) for port in services()[name]["ports"]} == ports, name
        looked_at = re.findall(r"127\.0\.0\.1\D+(\d{4})", " ".join(services()[name]["healthcheck"]["test"]))
        assert set(map(int, looked_at)) <= ports, name
        assert looked_at, name
    assert worker.comfyui_url == f"http://comfyui-simulator:{comfyui.comfyui_simulator_port}"
    assert worker.credits_url == f"http://credits-simulator:{comfyui.credits_simulator_port}"
    assert comfyui.callback_base_url == f"http://gateway:{gateway.gateway_port}"
    assert {worker.worker_host, gateway.gateway_host, comfyui.simulator_host} == {"0.0.0.0"}


def test_a_drain_is_never_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    grace = settings_of("worker", monkeypatch).grace_seconds
    assert int(services()["worker"]["stop_grace_period"].removesuffix("s")) > grace
    gpu_grace = settings_of("gpu-worker", monkeypatch).gpu_grace_seconds
    assert int(services()["gpu-worker"]["stop_grace_period"].removesuffix("s")) > gpu_grace


def test_what_a_service_waits_for_exists_and_can_come_true() -> None:
    for name, service in services().items():
        for other, wish in service.get("depends_on", {}).items():
            assert other in services(), f"{name} waits for {other}"
            condition = wish["condition"]
            runs_once = "restart" not in services()[other] or services()[other]["restart"] == "no"
            if condition == "service_healthy":
                assert "healthcheck" in services()[other], f"{other} has no health check"
                assert not runs_once, other
            else:
                assert condition == "service_completed_successfully"
                assert runs_once, f"{other} never ends"


def test_only_simulators_bridge_and_codec_server_are_optional() -> None:
    optional = {name: service["profiles"] for name, service in services().items() if "profiles" in service}
    assert optional == {
        "comfyui-simulator": ["simulators"],
        "credits-simulator": ["simulators"],
        "bridge": ["bridge"],
        "gpu-worker": ["bridge"],
        "codec-server": ["codec"],
    }


def test_temporal_is_set_up_as_on_one_machine() -> None:
    temporal = services()["temporal"]
    [mount] = temporal["volumes"]
    source, target, mode = mount.split(":")
    assert (PROJECT / source).resolve() == DYNAMIC_CONFIG
    assert target == temporal["environment"]["DYNAMIC_CONFIG_FILE_PATH"]
    assert mode == "ro"
    assert dynamic_config()["matching.enableFairness"] is True
    namespace = services()["temporal-namespace"]["environment"]
    assert namespace["SEARCH_ATTRIBUTES"].split() == list(SEARCH_ATTRIBUTES)
    assert namespace["RETENTION"] == RETENTION


def test_postgresql_is_healthy_only_once_it_listens() -> None:
    """While the image creates its database, a temporary server without a port answers at the socket."""
    command = services()["postgres"]["healthcheck"]["test"]
    assert command[command.index("--host") + 1] == "127.0.0.1"


def test_every_file_that_is_mounted_exists_and_every_script_is_shell() -> None:
    volumes = set(compose()["volumes"])
    for service in services().values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (PROJECT / source).is_file(), mount
    for script in (PROJECT / "deploy").glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)


def test_the_image_holds_every_package_that_its_commands_import() -> None:
    copied = set(re.findall(r"^COPY (\w+) \w+$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE))
    let_in = set(re.findall(r"^!(\w+)$", (PROJECT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied <= let_in
    sources = [*PROJECT.glob("*.py"), *(path for name in copied for path in in_the_image(name))]
    ours = {path.parent.name for path in PROJECT.glob("*/__init__.py")}
    assert imported_by(sources) & ours <= copied


def in_the_image(name: str) -> list[Path]:
    """The package's files; of `proof` only the rooms that .dockerignore lets in."""
    rooms = re.findall(r"^!proof/(\w+)$", (PROJECT / ".dockerignore").read_text(), re.MULTILINE)
    folders = [PROJECT / name] if name != "proof" else [PROJECT / name / room for room in rooms]
    return [path for folder in folders for path in folder.rglob("*.py")]


def imported_by(sources: list[Path]) -> set[str]:
    names: set[str] = set()
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(node.module.split(".")[0])
    return names
