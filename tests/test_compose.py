"""Checks of docker-compose.yml, Dockerfile and deploy/ without a container engine. `make test-containers` runs them."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import os
import re
import subprocess
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import asyncpg
import pytest
import yaml
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

import worker
from bridge.__main__ import GRACE_SECONDS as BRIDGE_GRACE_SECONDS
from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES, TASK_QUEUE
from gateway.__main__ import GRACE_SECONDS as GATEWAY_GRACE_SECONDS
from local_stack.parts import SECRETS_OF
from local_stack.ports import any_free_port
from local_stack.postgres import postgres_binaries
from local_stack.temporal_server import DYNAMIC_CONFIG, RETENTION, dynamic_config, temporal_binary
from runtime.settings import SECRETS, Settings
from store import TaskStore
from store.database import POOL_SIZE
from store.migrate import migrate
from tests.conftest import unique
from tests.postgres import postgres_of_its_own

PROJECT = Path(__file__).parent.parent
PREFIX = "COMFYUI_TEMPORAL_"
OTHERS_VARIABLES = {
    "postgres": {"POSTGRES_PASSWORD"},
    "database-users": {
        *("PGHOST", "PGUSER", "PGPASSWORD"),
        *("TEMPORAL_DATABASE_PASSWORD", "OWNER_DATABASE_PASSWORD", "SERVICES_DATABASE_PASSWORD"),
    },
    "temporal-schema": {"DB", "DB_PORT", "POSTGRES_SEEDS", "POSTGRES_USER", "POSTGRES_PWD", "SQL_PASSWORD"},
    "temporal": {
        *("DB", "DB_PORT", "POSTGRES_SEEDS", "POSTGRES_USER", "POSTGRES_PWD", "BIND_ON_IP"),
        *("DYNAMIC_CONFIG_FILE_PATH", "NUM_HISTORY_SHARDS"),
        *("SQL_MAX_CONNS", "SQL_MAX_IDLE_CONNS", "SQL_VIS_MAX_CONNS", "SQL_VIS_MAX_IDLE_CONNS"),
    },
    "temporal-namespace": {"TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "RETENTION", "SEARCH_ATTRIBUTES", "WAIT_SECONDS"},
    "temporal-ui": {"TEMPORAL_ADDRESS"},
}
ROLES = ("temporal", "comfyui_temporal", "comfyui_temporal_services")
OURS = ("tables", "purge", "worker", "gateway", "comfyui-simulator", "credits-simulator", "bridge", "gpu-worker")
ALTERNATIVES = {"SERVICE_TOKEN", "STREAM_TOKEN_SECRET", "BRIDGE_RESULT_SECRET"}
"""A secret that the service is given serves in their place."""
OPTIONAL = {"GPU_SERVER_TOKEN", "GPU_SERVER_LOGIN", "GPU_SERVER_HEADERS"}
"""Where they are needed they are in the service's own file, deploy/bridge.env."""
IN_OUR_IMAGE = (*OURS, "codec-server")
FIXED = {
    *("GATEWAY_HOST", "GATEWAY_PORT", "WORKER_HOST", "HEALTH_PORT", "METRICS_PORT", "GRACE_SECONDS"),
    *("BRIDGE_HOST", "BRIDGE_PORT", "BRIDGE_METRICS_PORT", "GPU_HEALTH_PORT", "GPU_METRICS_PORT", "GPU_GRACE_SECONDS"),
    *("CODEC_SERVER_HOST", "CODEC_SERVER_PORT"),
    *("SIMULATOR_HOST", "COMFYUI_SIMULATOR_PORT", "CREDITS_SIMULATOR_PORT", "SIMULATOR_FOLDER", "DATABASE_DSN"),
}
"""Settings that docker-compose.yml decides: published ports, checks, volumes and grace periods depend on them."""
SERVERS_SERVICES = 4
"""Temporal's frontend, history, matching and worker: each opens pools of its own."""
SECRET = "0123456789abcdef0123456789abcdef"
FILLED_IN = {
    "POSTGRES_PASSWORD": "p",
    "TEMPORAL_DATABASE_PASSWORD": "t",
    "OWNER_DATABASE_PASSWORD": "o",
    "SERVICES_DATABASE_PASSWORD": "s",
    f"{PREFIX}COMFYUI_URL": "http://comfyui-simulator:8188",
    f"{PREFIX}CREDITS_URL": "http://credits-simulator:8190",
    f"{PREFIX}CALLER_SECRET": SECRET,
    f"{PREFIX}SERVICE_SECRET": SECRET[::-1],
    f"{PREFIX}CALLBACK_SECRETS": "whsec_MDEyMzQ1Njc4OWFiY2RlZg==",
    f"{PREFIX}SIMULATOR_ADMIN_TOKEN": SECRET * 2,
    f"{PREFIX}CODEC_SERVER_TOKEN": SECRET * 3,
}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[?-])(?P<text>(?:[^{}]|\{\w+\})*))?\}")


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


def page_of(service: str) -> tuple[int, str]:
    """Port and path of the page that the service's check asks."""
    *program, url = services()[service]["healthcheck"]["test"]
    assert program == ["CMD", "python", "-IS", "runtime/health_check.py"]
    page = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/\w+)", url)
    assert page is not None
    return int(page[1]), page[2]


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
    digest = r"@sha256:[0-9a-f]{64}"
    for image in images:
        # Temporal's digests could not be verified: they are named by exact version.
        pinned = rf"({digest})?" if image.startswith(("temporalio/", "comfyui-temporal")) else digest
        assert re.fullmatch(r"[\w/-]+:\d+\.\d+[\w.-]*" + pinned, image), image
    assert {image for image in images if image.startswith("temporalio/")} == {
        f"temporalio/server:{version[1]}",
        f"temporalio/admin-tools:{version[1]}",
        f"temporalio/ui:{version[2]}",
    }
    dockerfile = (PROJECT / "Dockerfile").read_text()
    [base] = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-[\w-]+" + digest, base)
    assert {*re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)} == {"${PYTHON_IMAGE}", "app"}


def test_every_published_port_is_on_the_loopback_and_once() -> None:
    published = [port for service in services().values() for port in service.get("ports", [])]
    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    host_ports = [port.split(":")[1] for port in published]
    assert len(set(host_ports)) == len(host_ports)


def test_every_variable_is_known_to_the_service_that_gets_it() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    assert set(services()) == {*OTHERS_VARIABLES, *IN_OUR_IMAGE}
    for name, service in services().items():
        allowed = OTHERS_VARIABLES.get(name, known | {"PURGE_EVERY_SECONDS"} if name == "purge" else known)
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
    assert settings.dataset_roots == ["file:///datasets/{tenant_id}/"]


@pytest.mark.parametrize("service", IN_OUR_IMAGE)
def test_a_service_gets_the_secrets_that_it_reads_and_no_others(service: str) -> None:
    given = {name.removeprefix(PREFIX) for name in services()[service]["environment"]} & {s.upper() for s in SECRETS}
    assert given == SECRETS_OF["tables" if service == "purge" else service] - ALTERNATIVES - OPTIONAL


@pytest.mark.parametrize("service", OURS)
def test_every_command_names_a_program_that_exists(service: str) -> None:
    program_name, *command = services()[service]["command"]
    if program_name == "/bin/sh":
        [mount] = [mount for mount in services()[service]["volumes"] if mount.endswith(f":{command[0]}:ro")]
        assert (PROJECT / mount.split(":")[0]).is_file()
        return
    assert program_name == "python"
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
    bridge = settings_of("bridge", monkeypatch)
    listens = {
        "worker": {worker.health_port, worker.metrics_port},
        "gateway": {gateway.gateway_port},
        "comfyui-simulator": {comfyui.comfyui_simulator_port},
        "credits-simulator": {comfyui.credits_simulator_port},
        "bridge": {bridge.bridge_port, bridge.bridge_metrics_port},
        "codec-server": {settings_of("codec-server", monkeypatch).codec_server_port},
    }
    for name, ports in listens.items():
        assert {int(port.split(":")[2]) for port in services()[name]["ports"]} == ports, name
        assert page_of(name)[0] in ports, name
    gpu_worker = settings_of("gpu-worker", monkeypatch)
    assert page_of("gpu-worker")[0] == gpu_worker.gpu_health_port
    assert services()["gpu-worker"]["ports"] == [
        f"127.0.0.1:{gpu_worker.gpu_metrics_port}:{gpu_worker.gpu_metrics_port}"
    ]
    assert {gpu_worker.worker_host, bridge.bridge_host} == {"0.0.0.0"}
    assert worker.comfyui_url == f"http://comfyui-simulator:{comfyui.comfyui_simulator_port}"
    assert worker.credits_url == f"http://credits-simulator:{comfyui.credits_simulator_port}"
    assert comfyui.callback_base_url == f"http://gateway:{gateway.gateway_port}"
    # Who starts tasks is outside, and fetches results from there.
    published = {port.rpartition(":")[0] for service in services().values() for port in service.get("ports", [])}
    for address in (comfyui.simulator_public_url, bridge.bridge_url, gateway.gateway_public_url):
        assert (address or "").removeprefix("http://") in published
    assert {worker.worker_host, gateway.gateway_host, comfyui.simulator_host} == {"0.0.0.0"}


def test_a_drain_is_never_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    grace = settings_of("worker", monkeypatch).grace_seconds
    assert int(services()["worker"]["stop_grace_period"].removesuffix("s")) > grace
    # Requests, then calls in flight, as in deploy/kubernetes.
    assert int(services()["bridge"]["stop_grace_period"].removesuffix("s")) > 2 * BRIDGE_GRACE_SECONDS + 10
    assert int(services()["gateway"]["stop_grace_period"].removesuffix("s")) > GATEWAY_GRACE_SECONDS
    gpu_grace = settings_of("gpu-worker", monkeypatch).gpu_grace_seconds
    assert int(services()["gpu-worker"]["stop_grace_period"].removesuffix("s")) > gpu_grace


def test_every_command_for_compose_names_the_file_without_which_it_refuses_to_start() -> None:
    pages = [*(PROJECT / "docs").glob("*.md"), *PROJECT.glob("README*.md"), PROJECT / "docker-compose.yml"]
    commands = [found for page in pages for found in re.findall(r"docker compose [^`\n]*", page.read_text())]
    assert commands
    for command in commands:
        assert "--env-file deploy/compose.env" in command, command


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
            source = interpolated(mount).split(":")[0]
            made_by_the_operator = VARIABLE.match(mount) is not None
            assert source in volumes or made_by_the_operator or (PROJECT / source).is_file(), mount
    for script in (PROJECT / "deploy").glob("*.sh"):
        subprocess.run(["sh", "-n", script], check=True)


def test_the_image_holds_every_package_that_its_commands_import() -> None:
    copied = set(re.findall(r"^COPY (\w+)(?:/\w+)? \S+$", (PROJECT / "Dockerfile").read_text(), re.MULTILINE))
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


def test_every_setting_can_be_reached() -> None:
    """By a variable of deploy/compose.env, by deploy/settings.env, or it is one that the compose file decides."""
    for name in IN_OUR_IMAGE:
        decided = {
            variable.removeprefix(PREFIX)
            for variable, value in services()[name]["environment"].items()
            if variable.startswith(PREFIX) and f"${{{variable}" not in value
        }
        assert decided <= FIXED, f"{name}: {decided - FIXED}"
        if name == "codec-server":
            continue
        common, *own = services()[name]["env_file"]
        assert common == {"path": "deploy/settings.env", "required": False}
        example = (PROJECT / "deploy" / "settings.env.example").read_text()
        for file in own:
            assert file["required"] is False
            assert file["path"] in example


def test_settings_in_the_example_exist_and_hold_no_secret() -> None:
    example = (PROJECT / "deploy" / "settings.env.example").read_text()
    named = set(re.findall(rf"^# {PREFIX}(\w+)=", example, re.MULTILINE))
    assert named
    for name in named:
        field = Settings.model_fields[name.lower()]
        assert "SecretStr" not in str(field.annotation), name
        assert name not in FIXED


def test_files_with_secrets_are_not_kept_in_git() -> None:
    files = {file["path"] for service in services().values() for file in service.get("env_file", [])}
    for file in {"deploy/compose.env", *files}:
        ignored = subprocess.run(["git", "check-ignore", "--quiet", file], cwd=PROJECT, check=False)
        assert ignored.returncode == 0, file
        assert (PROJECT / file).parent.name not in (PROJECT / ".dockerignore").read_text(), "would get into the image"


def test_our_containers_may_write_their_volumes_and_nothing_else() -> None:
    for name in IN_OUR_IMAGE:
        service = services()[name]
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", service["user"]), name
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
    for name, service in services().items():
        assert "no-new-privileges:true" in service.get("security_opt", []), name
        # The image of PostgreSQL begins as root, and gives its folder to another user.
        assert service.get("cap_drop") == ["ALL"] or name == "postgres", name
        assert not service.get("privileged"), name


def test_what_runs_is_checked_by_readiness() -> None:
    """A process that is merely alive says nothing about what it needs."""
    pages = {name: page_of(name)[1] for name in IN_OUR_IMAGE if name not in ("tables", "purge")}
    assert pages == {
        "worker": "/startupz",
        "gateway": "/readyz",
        "bridge": "/readyz",
        "gpu-worker": "/readyz",
        "comfyui-simulator": "/health",
        "credits-simulator": "/health",
        "codec-server": "/healthz",
    }
    assert services()["tables"]["healthcheck"] == {"disable": True}, "the image's own check is the worker's"
    *_, told = services()["purge"]["healthcheck"]["test"]
    assert f"touch {told}" in (PROJECT / "deploy" / "purge.sh").read_text()


def test_what_runs_on_does_not_turn_its_check_off() -> None:
    """`up --wait` fails for such a service: it waits for a health that there is none of."""
    for name, service in services().items():
        runs_once = service.get("restart", "no") == "no"
        assert runs_once or "disable" not in service.get("healthcheck", {}), name


@pytest.mark.parametrize("name", ["COMFYUI_URL", "CREDITS_URL"])
def test_an_address_that_every_task_needs_is_demanded(name: str) -> None:
    """With a default they were those of simulators that need a profile: all was healthy, and nothing was there."""
    kinds = {
        match["kind"]
        for match in VARIABLE.finditer((PROJECT / "docker-compose.yml").read_text())
        if match["name"] == PREFIX + name
    }
    assert kinds == {"?"}


def test_the_database_s_superuser_only_creates_the_others() -> None:
    uses = {name for name, service in services().items() if "POSTGRES_PASSWORD:" in str(service["environment"])}
    assert uses == {"postgres", "database-users"}
    owner = {name for name, service in services().items() if "OWNER_DATABASE_PASSWORD" in str(service["environment"])}
    assert owner == {"database-users", "tables", "purge"}
    temporal = services()["temporal"]["environment"]
    assert (temporal["POSTGRES_USER"], interpolated(temporal["POSTGRES_PWD"])) == ("temporal", "t")


def test_the_pools_fit_postgresqls_connections() -> None:
    [*_, given] = services()["postgres"]["command"]
    limit = int(given.removeprefix("max_connections="))
    temporal = services()["temporal"]["environment"]
    servers = SERVERS_SERVICES * (int(temporal["SQL_MAX_CONNS"]) + int(temporal["SQL_VIS_MAX_CONNS"]))
    # The pool, the check of the namespace, and the gateway's listener.
    each = POOL_SIZE + 2
    kept_for_superusers = 3
    workers_and_gateways = 10
    assert servers + workers_and_gateways * each + kept_for_superusers < limit


async def ran(script: str, environment: dict[str, str]) -> tuple[int | None, str, str]:
    """Exit code, output and errors of one of deploy's scripts."""
    process = await asyncio.create_subprocess_exec(
        *("sh", str(PROJECT / "deploy" / script)),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_the_namespace_job_gives_up_with_a_sentence(tmp_path: Path) -> None:
    address = f"127.0.0.1:{any_free_port()}"
    began = time.monotonic()
    code, _, errors = await ran(
        "temporal-namespace.sh", namespace_environment(address, "any", wait_seconds=2, home=tmp_path)
    )
    assert code == 1
    assert f"Temporal at {address} does not answer" in errors
    assert "tried for 2 s" in errors
    assert time.monotonic() - began < 20


async def test_the_namespace_job_makes_a_namespace_and_may_be_repeated(
    temporal_env: WorkflowEnvironment, tmp_path: Path
) -> None:
    namespace = unique("compose")
    address = temporal_env.client.service_client.config.target_host
    for _ in range(2):
        environment = namespace_environment(address, namespace, wait_seconds=30, home=tmp_path)
        code, output, errors = await ran("temporal-namespace.sh", environment)
        assert code == 0, errors
        assert f"Namespace {namespace} keeps closed runs for {RETENTION}" in output
    client = await Client.connect(address, namespace=namespace)
    await worker.check_search_attributes(client)


def namespace_environment(address: str, namespace: str, *, wait_seconds: int, home: Path) -> dict[str, str]:
    given = services()["temporal-namespace"]["environment"]
    return {
        "PATH": f"{temporal_binary().parent}{os.pathsep}{os.defpath}",
        "HOME": str(home),
        "TEMPORAL_ADDRESS": address,
        "TEMPORAL_NAMESPACE": namespace,
        "RETENTION": given["RETENTION"],
        "SEARCH_ATTRIBUTES": given["SEARCH_ATTRIBUTES"],
        "WAIT_SECONDS": str(wait_seconds),
    }


@pytest.fixture
def other_postgres() -> Iterator[str]:
    """A server of this test's own: roles belong to the whole server."""
    with postgres_of_its_own() as server:
        yield str(server.get_uri())


async def test_each_database_user_reaches_its_own_databases_only(other_postgres: str) -> None:
    folder = other_postgres.partition("host=")[2]
    passwords = {f"{name}_DATABASE_PASSWORD": f"{name.lower()}1" for name in ("TEMPORAL", "OWNER", "SERVICES")}
    environment = {
        "PATH": f"{postgres_binaries()}{os.pathsep}{os.defpath}",
        "PGHOST": unquote(folder),
        "PGUSER": "postgres",
        **passwords,
    }
    for _ in range(2):
        code, _, errors = await ran("database-users.sh", environment)
        assert code == 0, errors

    async def may_connect(user: str, database: str) -> bool:
        try:
            connection = await asyncpg.connect(host=unquote(folder), user=user, database=database)
        except asyncpg.InsufficientPrivilegeError:
            return False
        assert await connection.fetchval("SELECT NOT rolsuper FROM pg_roles WHERE rolname = current_user")
        await connection.close()
        return True

    databases = ("temporal", "temporal_visibility", "comfyui_temporal")
    reached = {user: [name for name in databases if await may_connect(user, name)] for user in ROLES}
    assert reached == {
        "temporal": ["temporal", "temporal_visibility"],
        "comfyui_temporal": ["comfyui_temporal"],
        "comfyui_temporal_services": ["comfyui_temporal"],
    }
    dsn = f"postgresql://comfyui_temporal@/comfyui_temporal?host={folder}"
    await migrate(dsn)
    services_store = TaskStore(dsn.replace("comfyui_temporal@", "comfyui_temporal_services@"))
    await services_store.check()
    await services_store.home()
    await services_store.close()


def test_the_image_of_services_holds_no_simulator_and_says_who_it_is() -> None:
    stages = re.split(r"^FROM ", (PROJECT / "Dockerfile").read_text(), flags=re.MULTILINE)
    by_name = {re.search(r"AS (\w+)", stage)[1]: stage for stage in stages[1:]}  # type: ignore[index]
    assert list(by_name)[-1] == "services", "what `docker build` makes without a target"
    shipped = by_name["app"] + by_name["services"]
    assert "proof/simulators" not in shipped
    assert re.search(r"^COPY proof proof$", shipped, re.MULTILINE) is None
    for name in ("services", "simulators"):
        assert re.findall(r"^USER (\S+)$", by_name[name], re.MULTILINE) == ["10001:10001"]
    [user] = {services()[name]["user"] for name in IN_OUR_IMAGE}
    assert user == "10001:10001"
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in by_name["app"]
    check = services()["worker"]["healthcheck"]["test"][-1]
    assert "HEALTHCHECK" in by_name["services"] and check in by_name["services"]
