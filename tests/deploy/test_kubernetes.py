"""The Kubernetes manifests, without a cluster: by the published schemas, and by what our code reads and serves."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml

import gateway.__main__ as gateway_process
from bridge.__main__ import GRACE_SECONDS as BRIDGE_GRACE_SECONDS
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from runtime.settings import Settings
from tests.deploy.test_observability import exported, named_in

Json = dict[str, Any]
FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
PROJECT = Path(__file__).parents[2]
PREFIX: Final = "COMFYUI_TEMPORAL_"
OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()
"""Sidecars end after the other containers from 1.29 on."""
KUSTOMIZE: Final = "kustomize.config.k8s.io/"
KEDA: Final = "keda.sh/v1alpha1"
NAME: Final = "app.kubernetes.io/name"
OURS: Final = ("worker", "gateway", "bridge", "gpu-worker", "migrate", "purge")
OTHERS_VARIABLES: Final = {"POD_NAME", "TEMPORAL_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
_STORE: Final = {"object-store/access-key-id", "object-store/secret-access-key"}
SECRETS: Final = {
    "worker": {"database/dsn", "service-tokens/secret", "encryption/keys", "temporal/api-key", *_STORE},
    "gateway": {
        *("database/dsn", "callers/secret", "callers/stream-token-secret", "callbacks/gateway"),
        *("encryption/keys", "temporal/api-key", *_STORE),
    },
    "bridge": {
        *("service-tokens/secret", "bridge-results/secret", "callbacks/bridge"),
        *("encryption/keys", "temporal/api-key", *_STORE),
    },
    "gpu-worker": {"callbacks/gpu-worker", "encryption/keys", "temporal/api-key", *_STORE},
    "migrate": {"database-owner/dsn"},
    "purge": {"database-owner/dsn", *_STORE},
}
"""What each process needs, and nothing else: secret and key."""
PROBES: Final = {
    "worker": {"startupProbe": "/readyz", "readinessProbe": "/startupz", "livenessProbe": "/healthz"},
    "gateway": {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"},
    "bridge": {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"},
    "gpu-worker": {"startupProbe": "/healthz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"},
}
"""A page that is red while another party is away restarts nothing: liveness never asks it."""


@cache
def files() -> dict[Path, list[Json]]:
    return {path: list(yaml.safe_load_all(path.read_text())) for path in sorted(FOLDER.rglob("*.yaml"))}


def resources() -> list[Json]:
    documents = [document for path in files() for document in files()[path]]
    return [document for document in documents if not document["apiVersion"].startswith(KUSTOMIZE)]


def of_kind(*kinds: str) -> list[Json]:
    found = [resource for resource in resources() if resource["kind"] in kinds]
    assert found, kinds
    return found


def template_of(workload: Json) -> Json:
    spec = workload["spec"].get("jobTemplate", workload)["spec"]
    template: Json = spec["template"]
    return template


@cache
def workloads() -> dict[str, Json]:
    """By name; each has one pod template."""
    found = {resource["metadata"]["name"]: resource for resource in of_kind("Deployment", "Job", "CronJob")}
    assert tuple(sorted(found)) == tuple(sorted(OURS))
    return found


def pod_of(name: str) -> Json:
    pod: Json = template_of(workloads()[name])["spec"]
    return pod


def container_of(name: str) -> Json:
    [container] = pod_of(name)["containers"]
    found: Json = container
    return found


def settings_file() -> dict[str, str]:
    lines = (FOLDER / "base" / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What the process would read, with secrets of the right form."""
    container = container_of(name)
    values = settings_file() if "envFrom" in container else {}
    forms = {"DATABASE_DSN": "postgresql://u:p@db:5432/d", "CALLBACK_SECRETS": "whsec_MDEyMzQ1Njc4OWFiY2RlZg=="}
    for variable in container["env"]:
        short = variable["name"].removeprefix(PREFIX)
        secret = forms.get(short, (short * 32)[:40])
        if short not in ("ENCRYPTION_KEYS", "POD_NAME"):
            values[variable["name"]] = variable.get("value", secret)
    for variable_name, value in values.items():
        monkeypatch.setenv(variable_name, value)
    return Settings(_env_file=None)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_resource_keeps_to_the_published_schema(version: str) -> None:
    checked = [resource for resource in resources() if resource["apiVersion"] != KEDA]
    assert len(checked) > 20
    for resource in checked:
        kubernetes_validate.validate(resource, version, strict=True)


def test_the_schemas_find_a_misspelt_field() -> None:
    broken = yaml.safe_load(yaml.safe_dump(workloads()["worker"]))
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(broken, NEWEST, strict=True)


def test_every_file_belongs_to_a_kustomization_and_every_kustomization_to_the_example() -> None:
    reached = {FOLDER / "example", FOLDER / "example" / "migrate"}
    for path, [kustomization] in [(path, files()[path]) for path in files() if path.name == "kustomization.yaml"]:
        listed = kustomization.get("resources", [])
        for entry in [*listed, *kustomization.get("components", [])]:
            place = (path.parent / entry).resolve()
            assert place.exists(), entry
            if place.is_dir():
                reached.add(place)
                assert (place / "kustomization.yaml").is_file()
        beside = {other.name for other in files() if other.parent == path.parent} - {"kustomization.yaml"}
        assert beside == {entry for entry in listed if entry.endswith(".yaml")}
        is_component = path.parent.parent.name == "components" or path.parent.name == "images"
        assert kustomization["kind"] == ("Component" if is_component else "Kustomization")
    assert reached == {path.parent for path in files()}


def _built(folder: Path) -> tuple[list[Json], dict[str, tuple[str, str]]]:
    """The resources of a kustomization, and image → the name and tag that it gets."""
    [kustomization] = files()[folder / "kustomization.yaml"]
    made: list[Json] = []
    images: dict[str, tuple[str, str]] = {}
    for entry in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        place = (folder / entry).resolve()
        if place.is_dir():
            inside, named = _built(place)
            made, images = [*made, *inside], images | named
        else:
            made += files()[place]
    own = {image["name"]: (image["newName"], image["newTag"]) for image in kustomization.get("images", [])}
    return made, images | own


def test_what_the_examples_commands_apply_is_in_one_namespace_and_of_one_version() -> None:
    example = FOLDER / "example"
    text = (example / "kustomization.yaml").read_text()
    [(_, *created)] = re.findall(r"^#   (kubectl create namespace) (\S+)$", text, re.MULTILINE)
    applied = re.findall(r"^#   kubectl apply --kustomize (\S+)$", text, re.MULTILINE)
    assert applied == ["migrate", "."]
    versions = set()
    for folder in applied:
        [kustomization] = files()[(example / folder / "kustomization.yaml").resolve()]
        assert [kustomization["namespace"]] == created
        made, images = _built((example / folder).resolve())
        pods = [template_of(one)["spec"] for one in made if one["kind"] in ("Deployment", "Job", "CronJob")]
        used = {box["image"] for pod in pods for box in [*pod["containers"], *pod.get("initContainers", [])]}
        assert used and used <= images.keys(), "kubelet would look for an image of the bare name"
        versions.add(images["comfyui-temporal"])
    assert len(versions) == 1
    for wait in re.findall(r"kubectl wait .*", "".join(path.read_text() for path in files())):
        assert f"--namespace {created[0]} " in wait


def test_names_of_one_kind_are_unique() -> None:
    names = [(resource["kind"], resource["metadata"]["name"]) for resource in resources()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", OURS)
def test_a_pod_has_no_rights_that_it_does_not_need(name: str) -> None:
    pod, container = pod_of(name), container_of(name)
    assert pod["serviceAccountName"] == name
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (10001, 10001)
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
    assert "memory" in container["resources"]["limits"]
    accounts = {account["metadata"]["name"]: account for account in of_kind("ServiceAccount")}
    assert accounts[name]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", OURS)
def test_a_process_gets_the_secrets_that_it_needs_and_no_other(name: str) -> None:
    references = [variable.get("valueFrom", {}).get("secretKeyRef") for variable in container_of(name)["env"]]
    secrets = [reference for reference in references if reference]
    assert {f"{reference['name']}/{reference['key']}" for reference in secrets} == SECRETS[name]
    optional = {reference["name"] for reference in secrets if reference.get("optional")}
    assert optional <= {"encryption", "temporal", "object-store"}
    page = OPERATIONS.read_text()
    for reference in secrets:
        assert re.search(rf"^\| [^|]+ \| `{reference['name']}` \|.*`{reference['key']}`", page, re.MULTILINE), reference


@pytest.mark.parametrize("name", OURS)
def test_a_process_reads_settings_that_exist_and_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    given = {variable["name"] for variable in container_of(name)["env"]}
    assert given <= known | OTHERS_VARIABLES
    assert settings_file().keys() <= known | {"AWS_REGION"}
    settings = settings_of(name, monkeypatch)
    assert settings.task_queue == TASK_QUEUE


@pytest.mark.parametrize("name", OURS)
def test_a_process_runs_a_program_that_exists(name: str) -> None:
    python, *command = container_of(name)["command"]
    assert python == "python"
    if command[0] == "-m":
        assert importlib.util.find_spec(command[1]) is not None
    else:
        assert (PROJECT / command[0]).is_file()


def test_ports_are_those_that_the_process_listens_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def ports(name: str) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in container_of(name)["ports"]}

    worker, gateway = settings_of("worker", monkeypatch), settings_of("gateway", monkeypatch)
    bridge, gpu = settings_of("bridge", monkeypatch), settings_of("gpu-worker", monkeypatch)
    assert ports("worker") == {"health": worker.health_port, "metrics": worker.metrics_port}
    assert ports("gateway") == {"http": gateway.gateway_port, "operations": gateway.gateway_operations_port}
    assert ports("bridge") == {"http": bridge.bridge_port, "metrics": bridge.bridge_metrics_port}
    assert ports("gpu-worker") == {"health": gpu.gpu_health_port, "metrics": gpu.gpu_metrics_port}
    assert {worker.worker_host, gateway.gateway_host, bridge.bridge_host, gpu.worker_host} == {"0.0.0.0"}
    for name in ("worker", "gateway", "bridge", "gpu-worker"):
        container = container_of(name)
        probes = [value for key, value in container.items() if key.endswith("Probe")]
        assert {probe["httpGet"]["port"] for probe in probes} <= ports(name).keys()
        paths = {key: value["httpGet"]["path"] for key, value in container.items() if key.endswith("Probe")}
        assert paths == PROBES[name]
    for service in of_kind("Service"):
        name = service["metadata"]["name"]
        assert service["spec"]["selector"] == {NAME: name}
        for port in service["spec"]["ports"]:
            assert port["port"] == ports(name)[port["targetPort"]]
    assert settings_file()[f"{PREFIX}CALLBACK_BASE_URL"] == f"http://gateway:{gateway.gateway_port}"
    assert settings_file()[f"{PREFIX}BRIDGE_URL"] == f"http://bridge:{bridge.bridge_port}"


def test_a_drain_is_never_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    def pre_stop(name: str) -> int:
        command = container_of(name).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
        return int(command[1])

    drains = {
        "worker": settings_of("worker", monkeypatch).grace_seconds,
        "gateway": gateway_process.GRACE_SECONDS,
        "bridge": 2 * BRIDGE_GRACE_SECONDS,  # requests, then calls in flight
        "gpu-worker": settings_of("gpu-worker", monkeypatch).gpu_grace_seconds,
    }
    for name, seconds in drains.items():
        assert pod_of(name)["terminationGracePeriodSeconds"] >= pre_stop(name) + seconds + 10, name
    # Only who is reached through a Service must wait until nobody sends there any more.
    assert {name for name in drains if pre_stop(name)} == {
        service["metadata"]["name"] for service in of_kind("Service")
    }


def test_a_graph_that_runs_outlives_the_signal() -> None:
    """A sidecar (an init container that goes on) ends after the worker."""
    [comfyui] = pod_of("gpu-worker")["initContainers"]
    assert comfyui["restartPolicy"] == "Always"
    command = container_of("gpu-worker")["command"]
    assert command[command.index("--server") + 1] == f"http://127.0.0.1:{comfyui['ports'][0]['containerPort']}"
    assert "$(POD_NAME)" in command, "else every pod would be the same server"


def test_selectors_choose_pods_that_exist() -> None:
    labels = [template_of(workload)["metadata"]["labels"] for workload in workloads().values()]
    assert labels == [{NAME: name} for name in workloads()]
    everywhere = {"app.kubernetes.io/part-of": "comfyui-temporal"}
    for resource in resources():
        spec = resource.get("spec", {})
        selectors = [spec.get("selector"), spec.get("podSelector")]
        for selector in filter(None, selectors):
            chosen = selector.get("matchLabels", selector)
            assert chosen in labels or chosen == everywhere, resource["metadata"]
    for deployment in of_kind("Deployment"):
        assert deployment["spec"]["selector"]["matchLabels"] == template_of(deployment)["metadata"]["labels"]
    adding = [document for path in files() for document in files()[path] if document.get("labels")]
    adds = [document["labels"] for document in adding if document["apiVersion"].startswith(KUSTOMIZE)]
    assert adds == [[{"pairs": everywhere, "includeTemplates": True}]] * 3


def test_every_deployment_has_a_disruption_budget_and_a_policy() -> None:
    deployments = {deployment["metadata"]["name"] for deployment in of_kind("Deployment")}
    budgets = of_kind("PodDisruptionBudget")
    assert {budget["spec"]["selector"]["matchLabels"][NAME] for budget in budgets} == deployments
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy")}
    assert policies.keys() == {*OURS, "nothing-but"}
    for name in OURS:
        assert policies[name]["podSelector"]["matchLabels"] == {NAME: name}
        assert set(policies[name]["policyTypes"]) == {"Ingress", "Egress"}
        opened = {port["port"] for rule in policies[name].get("ingress", []) for port in rule["ports"]}
        listens = {port["name"]: port["containerPort"] for port in container_of(name).get("ports", [])}
        # The kubelet's probes need no rule.
        assert opened == {port for what, port in listens.items() if what != "health"}, name
        # Who scrapes comes from the namespace of Prometheus alone, to the port that has `/metrics`.
        scraped = [rule for rule in policies[name].get("ingress", []) if "from" in rule]
        assert [port["port"] for rule in scraped for port in rule["ports"]] == [
            port for what, port in listens.items() if what in ("metrics", "operations")
        ], name


def test_a_process_reaches_what_its_settings_name() -> None:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind("NetworkPolicy")}
    reached = {
        name: {port["port"] for rule in policies[name].get("egress", []) for port in rule["ports"]} for name in OURS
    }
    temporal, database, https, bridge, gateway = 7233, 5432, 443, 8195, 8180
    assert reached["worker"] == {temporal, database, https, bridge}
    assert reached["gateway"] == {temporal, database, https}
    assert reached["bridge"] == reached["gpu-worker"] == {temporal, https, gateway}
    assert reached["purge"] == {database, https}
    assert reached["migrate"] == {database, 53}


# Scaling


def scaled() -> Iterator[tuple[str, Json]]:
    for resource in of_kind("HorizontalPodAutoscaler", "ScaledObject"):
        yield resource["kind"], resource


def test_what_is_scaled_exists_and_sets_no_number_of_its_own() -> None:
    by_hpa = {hpa["spec"]["scaleTargetRef"]["name"] for kind, hpa in scaled() if kind == "HorizontalPodAutoscaler"}
    by_keda = {one["spec"]["scaleTargetRef"]["name"] for kind, one in scaled() if kind == "ScaledObject"}
    assert by_hpa == {"worker", "gateway"}
    assert by_keda == {"worker", "gpu-worker"}
    for name in by_hpa:
        assert "replicas" not in workloads()[name]["spec"], "each apply would set it back"
    # Where KEDA scales, the plain HPA goes.
    [keda] = files()[FOLDER / "components" / "keda" / "kustomization.yaml"]
    [patch] = [yaml.safe_load(patch["patch"]) for patch in keda["patches"]]
    assert (patch["$patch"], patch["kind"], patch["metadata"]["name"]) == (
        "delete",
        "HorizontalPodAutoscaler",
        "worker",
    )


def test_keda_s_objects_have_only_fields_that_keda_knows() -> None:
    """KEDA's own schema is not among the published ones of Kubernetes (https://keda.sh/docs/latest/scalers/temporal)."""
    known = {
        "temporal": {
            *("endpoint", "namespace", "taskQueue", "queueTypes", "targetQueueSize", "activationTargetQueueSize"),
        },
        "prometheus": {"serverAddress", "query", "threshold", "ignoreNullValues"},
        "cpu": {"value"},
    }
    for kind, one in scaled():
        if kind != "ScaledObject":
            continue
        assert one["spec"].keys() <= {
            *("scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval"),
            *("fallback", "advanced", "triggers"),
        }
        assert one["spec"]["minReplicaCount"] >= 1, "nobody would be left to say that work waits"
        for trigger in one["spec"]["triggers"]:
            assert trigger["metadata"].keys() <= known[trigger["type"]]
            assert all(isinstance(value, str) for value in trigger["metadata"].values())


def test_workers_are_scaled_by_the_queue_that_they_poll() -> None:
    [worker] = [one for kind, one in scaled() if kind == "ScaledObject" and one["metadata"]["name"] == "worker"]
    by_type = {trigger["type"]: trigger["metadata"] for trigger in worker["spec"]["triggers"]}
    assert by_type["temporal"]["taskQueue"] == TASK_QUEUE
    assert by_type["temporal"]["endpoint"] == settings_file()[f"{PREFIX}TEMPORAL_ADDRESS"]
    assert by_type["temporal"]["namespace"] == settings_file()[f"{PREFIX}TEMPORAL_NAMESPACE"]
    assert "cpu" in by_type, "the backlog of busy workers that keep up is zero"


def test_servers_are_scaled_by_what_waits_and_runs() -> None:
    [gpu] = [one for kind, one in scaled() if kind == "ScaledObject" and one["metadata"]["name"] == "gpu-worker"]
    [trigger] = gpu["spec"]["triggers"]
    query = re.sub(r"max_over_time", "max", trigger["metadata"]["query"])
    assert named_in(query) == {"bridge_pool_demand"} <= exported()
    assert gpu["spec"]["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_the_operators_page_says_that_no_cluster_ran_them() -> None:
    assert "No cluster has run" in OPERATIONS.read_text()
