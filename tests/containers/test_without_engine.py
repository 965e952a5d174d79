"""What `make test-containers` does where no container engine runs, and what it prepares for one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from local_stack.demo import TENANT
from local_stack.folder import PROJECT
from proof.containers.__main__ import main
from proof.containers.debian_engine import HOST, debian_engine
from proof.containers.engine import CannotRun, CommandFailed, Engine, found_engine
from proof.containers.name_server import answering_no
from proof.containers.project import Project
from proof.containers.report import Report, in_time
from proof.containers.stand_ins import stage_of, without_digest


def stub(folder: Path, *, server: str, compose: str) -> Path:
    """A command `docker` that answers so."""
    docker = folder / "docker"
    docker.write_text(f'#!/bin/sh\ncase $1 in info) echo "{server}" ;; compose) echo "{compose}" ;; esac\n')
    docker.chmod(0o755)
    return docker


@pytest.mark.parametrize(
    ("server", "compose", "is_used"),
    [("28.2.2", "2.38.1", True), ("20.10.24", "2.24.0", True), ("20.10.24", "1.29.2", False), ("", "2.38.1", False)],
)
def test_an_engine_at_hand_is_used_if_it_answers_and_understands_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, compose: str, is_used: bool
) -> None:
    stub(tmp_path, server=server, compose=compose)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    engine = found_engine()
    assert (engine is not None) == is_used
    if engine is not None:
        assert server in engine.name
        assert not engine.stand_ins


def test_where_none_can_run_it_says_so_and_ends_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["--folder", str(tmp_path / "folder")]) == 0
    sentence, last = capsys.readouterr().out.splitlines()
    assert sentence.startswith("No container engine answers, and none can be made: apt-get and dpkg-deb")
    assert last == "containers: NOT RUN"


def test_without_root_none_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "dpkg-deb", "ip"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(CannotRun, match="this is not root; it takes root on Debian"), debian_engine(tmp_path):
        pytest.fail("it was made")


def test_a_project_has_ports_and_secrets_of_its_own_and_leaves_the_developers_out(tmp_path: Path) -> None:
    engine = Engine("stub", "docker", stand_ins=True, name_server=HOST)
    project = Project(engine, tmp_path / "project")
    project.write()
    files = {path.name for path in (tmp_path / "project" / "deploy").iterdir()}
    ours = {path.name for path in (PROJECT / "deploy").iterdir() if path.is_file() and path.suffix != ".env"}
    assert ours == files - {"compose.env"}
    assert (tmp_path / "project" / "datasets" / TENANT / "demo-cats").is_dir()

    override = (tmp_path / "project" / "override.yml").read_text()
    added = yaml.safe_load(override.replace("!override ", ""))["services"]
    for name, service in project.file["services"].items():
        assert added[name]["dns"] == [HOST]
        assert "@" not in added[name]["image"]
        inside = [port.split(":")[2] for port in service.get("ports", [])]
        assert [port.split(":")[2] for port in added[name].get("ports", [])] == inside
        for address, published, port in (port.split(":") for port in added[name].get("ports", [])):
            assert f"http://{address}:{published}" == project.url(
                next(int(given.split(":")[1]) for given in service["ports"] if given.endswith(f":{port}"))
            )
    values = [value for name, value in project.variables.items() if "SECRET" in name or "PASSWORD" in name]
    assert len(set(values)) == len(values)


def test_the_name_server_says_that_there_is_no_such_name() -> None:
    question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03org\x00\x00\x10\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with answering_no("127.0.0.1", port), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.sendto(question, ("127.0.0.1", port))
        answer, _ = client.recvfrom(512)
    assert answer[:2] == question[:2]
    assert answer[2] & 0x80, "it is an answer"
    assert answer[3] & 0x0F == 3, "NXDOMAIN"
    assert answer[12:] == question[12:]


def test_each_image_of_the_file_has_a_stand_in() -> None:
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"].values()
    others = {service["image"] for service in services if "build" not in service}
    assert {stage_of(image) for image in others} == {"postgres", "server", "admin-tools", "ui"}
    assert all("@" not in without_digest(image) for image in others)


def test_a_check_that_fails_is_counted_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> str:
        raise CommandFailed("exit code 1")

    report = Report()
    assert not report.check("the first", fails)
    assert report.check("the second", lambda: "seen")
    assert report.close() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "containers: 1 passed, 1 failed"


@pytest.mark.parametrize(("load", "is_judged"), [(0.5, True), (50.0, False)])
def test_a_time_is_judged_where_no_other_work_has_the_processors(
    monkeypatch: pytest.MonkeyPatch, load: float, is_judged: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert in_time(2.0, 3.0) == "at most 3 s"
    if is_judged:
        with pytest.raises(AssertionError, match=r"4.0 s, more than 3 s"):
            in_time(4.0, 3.0)
    else:
        assert "NOT JUDGED" in in_time(4.0, 3.0)


@pytest.mark.parametrize(
    ("said", "is_a_defect"), [("dial tcp: lookup registry: no such host", False), ("manifest unknown", True)]
)
def test_without_a_registry_it_is_not_run_and_an_unknown_image_is_a_defect(
    tmp_path: Path, said: str, is_a_defect: bool
) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    docker.chmod(0o755)
    project = Project(Engine("the engine at hand", str(docker)), tmp_path / "project")
    if is_a_defect:
        project.fetch()
        with pytest.raises(CommandFailed, match=said):
            project.build(tmp_path)
    else:
        with pytest.raises(CannotRun, match=f"reaches no registry: {said}"):
            project.fetch()
