"""`.run`: who may read it, who may use it, and what it remembers."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from local_stack.child import is_running, kill_leftover
from local_stack.folder import PROJECT, AlreadyLocked, ProcessRecord, RunFolder, StackFailure
from local_stack.ports import any_free_port, choose_ports, is_free


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_its_owner_may_look_into_it(tmp_path: Path) -> None:
    wide_open = tmp_path / "run"
    wide_open.mkdir(mode=0o755)
    folder = RunFolder(wide_open)
    folder.secrets()
    folder.remember_ports({"temporal": 7233})
    assert mode_of(folder.path) == 0o700
    for name in ("secrets.json", "ports.json"):
        assert mode_of(folder.path / name) == 0o600


def test_secrets_are_made_once_and_differ_between_folders(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "a").secrets()
    assert RunFolder(tmp_path / "a").secrets() == first
    other = RunFolder(tmp_path / "b").secrets()
    assert other.caller_secret != first.caller_secret
    assert other.admin_token != first.admin_token
    assert first.callback_secret.startswith("whsec_")
    assert len(set(first.model_dump().values())) == len(first.model_dump()), "no secret has two uses"


def test_an_earlier_versions_folder_keeps_its_secrets_and_gets_the_missing_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    earlier = {"token_secret": "t", "callback_secret": "c", "admin_token": "a", "database_password": "d"}
    (folder.path / "secrets.json").write_text(json.dumps(earlier))
    secrets = folder.secrets()
    assert (secrets.database_password, secrets.callback_secret) == ("d", "c")
    assert secrets.caller_secret and secrets.service_secret
    assert folder.secrets() == secrets


def test_two_stacks_never_share_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        with pytest.raises(AlreadyLocked) as refused, RunFolder(folder.path).locked():
            pytest.fail("a second one got in")
        assert refused.value.pid == os.getpid()
        assert folder.is_locked()
    assert not folder.is_locked()


def test_a_killed_owner_leaves_no_lock_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    code = (
        "import sys, time, pathlib; from local_stack.folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).locked(): print('mine', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder.path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"mine\n"
        assert folder.is_locked()
        owner.kill()
    assert not folder.is_locked()


def test_a_half_written_description_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.path / "stack.json").write_text('{"temporal_address": "127.0')
    (folder.path / "processes.json").write_text("")
    assert folder.description() is None
    assert folder.record() is None


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StackFailure, match=r"cannot be used: .*--folder"):
        RunFolder(tmp_path / "file" / "run")


def test_a_leftover_is_ended_but_never_another_process_under_its_id() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            other = ProcessRecord(pid=process.pid, started=time.time() - 3600)
            assert not is_running(other)
            assert not kill_leftover(other)
            assert process.poll() is None
            same = ProcessRecord(pid=process.pid, started=psutil.Process(process.pid).create_time())
            assert kill_leftover(same)
            assert not is_running(same)
            assert not kill_leftover(same)
        finally:
            process.kill()


def test_ports_are_the_last_ones_then_the_usual_then_any() -> None:
    usual, last = any_free_port(), any_free_port()
    assert choose_ports({}, {"gateway": usual}) == {"gateway": usual}
    assert choose_ports({"gateway": last}, {"gateway": usual}) == {"gateway": last}


def test_a_taken_port_is_given_up_for_another() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        chosen = choose_ports({"gateway": port}, {"gateway": port})
        assert chosen["gateway"] != port
        assert is_free(chosen["gateway"])


def test_no_two_parts_get_one_port() -> None:
    port = any_free_port()
    chosen = choose_ports({"worker": port}, {"gateway": port, "worker": port})
    assert chosen["gateway"] != chosen["worker"]


def test_a_port_that_another_stack_has_chosen_and_does_not_listen_at_yet_is_not_chosen() -> None:
    port = any_free_port()
    choosing = f"from local_stack.ports import choose_ports; print(choose_ports({{}}, {{'gateway': {port}}})); input()"
    command = [sys.executable, "-u", "-c", choosing]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == f"{{'gateway': {port}}}\n"
        assert is_free(port)
        assert choose_ports({}, {"gateway": port})["gateway"] != port
        other.communicate("\n")
    assert choose_ports({}, {"gateway": port}) == {"gateway": port}
