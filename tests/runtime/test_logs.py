"""What a log line may not show, whoever wrote it; and what a process says of settings that it cannot use."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.logs import HIDDEN, OURS, redacted
from runtime.settings import Settings

PROJECT = Path(__file__).parents[2]
MARK = "marked0secret"
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJ0ZW5hbnRfaWQiOiJ0In0.{MARK}-_x"
LINES = {
    "an address": f'"WebSocket /api/v1/tasks/stream/ws?subscribe=*&token={MARK}" [accepted]',
    "a header": f"< Authorization: Bearer {MARK}",
    "a header in a dictionary": str({"authorization": f"bearer {MARK}", "host": "gateway"}),
    "a token by itself": f"cannot read {JWT}.",
    "a token without its signature": f"cannot read eyJhbGciOiJIUzI1NiJ9.{MARK}.",
    "a cookie": f"Cookie: a=b; comfyui_temporal_token={MARK}; c=d",
    "a DSN": f"cannot connect to postgresql://user:{MARK}@host:5432/db?sslmode=require",
    "a password with signs": f"cannot connect to postgresql://user:{MARK}@{MARK}:@host:5432/db",
    "a callback secret": f"whsec_{MARK}/+==",
    "a callback's signature": f"webhook-signature: v1,{MARK}K5oZfzN95Z9UVu1EsfQmfVNQhnkZ2pj9o9NDN/H/pI4=",
    "a signed result": f"GET /comfyui/files/1.png?expires=1&signature={MARK}",
    "a presigned address": f"https://s3.example/1.png?X-Amz-Credential={MARK}&X-Amz-Signature={MARK}&x=1",
    "an address of Azure": f"https://blob.example/1.png?sv=1&sig={MARK}",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_secret_is_known_by_its_place(line: str, as_json: bool) -> None:
    shown = redacted(json.dumps({"event": line, "quoted": f'"{line}"'}) if as_json else line)
    assert MARK not in shown and HIDDEN in shown
    if as_json:
        assert set(json.loads(shown)) == {"event", "quoted"}


def test_what_is_no_secret_stays() -> None:
    line = "GET http://127.0.0.1:8180/api/v1/tasks?limit=2 image-1 by tenant-demo: 3 tokens, 1 signature, at v1, e.g."
    assert redacted(line) == line


def test_the_values_of_a_process_are_hidden_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        **{name: f"{MARK} of {name}, long enough" for name in ("caller_secret", "service_secret", "service_token")},
        "callback_secrets": f"whsec_{MARK},gpu-1:whsec_{MARK}2",
        "database_dsn": f"postgresql://user:{MARK}%21word@host/db",
    }
    monkeypatch.setenv("TEMPORAL_API_KEY", f"{MARK} of Temporal's own")
    settings = Settings(_env_file=None, **values)  # type: ignore[arg-type]
    assert f"{MARK} of Temporal's own" in settings.hidden_values
    assert {f"{MARK}%21word", f"{MARK}!word", f"whsec_{MARK}2"} <= set(settings.hidden_values)
    assert set(values.values()) - {values["callback_secrets"]} <= set(settings.hidden_values)


PROGRAM = """
import logging, structlog
from runtime.logs import configure_logs
configure_logs(level="DEBUG", as_json=True, hidden=['quoted"marked0secret', "pw"])
structlog.get_logger("gateway.streams").debug("ours", said='quoted"marked0secret', word="spwn")
logging.getLogger("websockets.server").debug("theirs: marked0secret")
logging.getLogger("uvicorn.error").info("/ws?token=%s", "marked0secret")
try:
    raise ValueError("postgresql://user:marked0secret@host/db")
except ValueError:
    structlog.get_logger("store").exception("failed")
raise RuntimeError("Bearer marked0secret")
"""


def test_libraries_never_log_at_debug_and_no_exception_shows_a_secret() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert MARK not in ended.stdout + ended.stderr
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["ours", f"/ws?token={HIDDEN}", "failed", "uncaught"]
    assert lines[0]["word"] == "spwn", "a value of two letters is no reason to cut words"
    assert "RuntimeError" in lines[-1]["exception"]


RETRIES = """
import logging
from temporalio.exceptions import ApplicationError
from runtime.logs import configure_logs
configure_logs(level="INFO", as_json=True)
unavailable = ApplicationError("no answer", type="credits_unavailable")
for error in (unavailable, ApplicationError("odd", type="KeyError"), ValueError("bug")):
    try:
        raise error
    except Exception:
        logging.getLogger("temporalio.activity").warning("Completing activity as failed", exc_info=True)
"""


def test_a_retry_leaves_no_traceback_and_an_unforeseen_error_does() -> None:
    ended = subprocess.run([sys.executable, "-c", RETRIES], cwd=PROJECT, capture_output=True, text=True, check=True)
    shown = [json.loads(line)["exception"].splitlines()[-1] for line in ended.stderr.splitlines()]
    assert [line.partition(": ")[2] for line in shown] == ["KeyError: odd", "bug"]


def test_what_a_run_logs_is_a_sentence_with_the_runs_id_as_a_field() -> None:
    program = """
import logging
from runtime.logs import configure_logs
configure_logs()
run = {"workflow_id": "reconcile-comfyui", "attempt": 2, "namespace": "default"}
log = logging.getLogger("workflows.reconciler")
log.info(f"%s is being given back already ({run})", "image-1", extra={"temporal_workflow": run})
log.info("nobody's ({})")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PROJECT)
    first, second = (json.loads(line) for line in done.stderr.splitlines())
    assert first["event"] == "image-1 is being given back already"
    assert (first["workflow_id"], first["attempt"]) == ("reconcile-comfyui", 2)
    assert "namespace" not in first and second["event"] == "nobody's ({})"


def test_every_logger_of_ours_has_the_level_of_the_settings() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=PROJECT, capture_output=True, text=True, check=True)
    sources = [name for name in listed.stdout.split() if not name.startswith("tests/")]
    names = set()
    for source in sources:
        for name in re.findall(r"get_logger\((.+?)\)", (PROJECT / source).read_text(encoding="utf-8")):
            names.add(source.partition("/")[0] if name == "__name__" else name.strip('"'))
    assert names and names <= set(OURS)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"caller_secret": "s" * 32, "service_secret": "s" * 32}, "caller_secret and service_secret"),
        ({"service_secret": "s" * 32, "simulator_admin_token": "s" * 32}, "service_secret and simulator_admin_token"),
        ({"caller_audience": "all", "service_audience": "all"}, "caller_audience and service_audience"),
    ],
)
def test_callers_and_services_never_share_a_key_or_an_audience(given: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must differ") as refused:
        Settings(_env_file=None, **given)  # type: ignore[arg-type]
    assert "ssss" not in str(refused.value)


BAD = {
    **dict.fromkeys(("CALLER_SECRET", "SERVICE_SECRET", "STREAM_TOKEN_SECRET", "BRIDGE_RESULT_SECRET"), MARK),
    **{
        "SIMULATOR_ADMIN_TOKEN": MARK,
        "SERVICE_TOKEN": MARK,
        "CALLBACK_SECRETS": f"whsec_{MARK}!",
        "LOG_LEVEL": "DEBUG",
    },
    "DATABASE_DSN": f"postgresql://user:{MARK}@127.0.0.1:1/none",
}
ENTRY_POINTS = {
    "worker": ["worker.py"],
    "gateway": ["-m", "gateway"],
    "bridge": ["-m", "bridge"],
    "GPU worker": ["-m", "bridge.gpu_worker", "--server", "http://127.0.0.1:1"],
    "simulated ComfyUI": ["-m", "proof.simulators", "comfyui"],
    "simulated credits": ["-m", "proof.simulators", "credits"],
    "conformance": ["-m", "proof.conformance", "--url", "http://127.0.0.1:1"],
    "tables": ["-m", "store", "migrate"],
    "doctor": ["starter.py", "doctor"],
}


def run(command: list[str], folder: Path, settings: dict[str, str]) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COMFYUI_TEMPORAL_")}
    given = {f"COMFYUI_TEMPORAL_{name}": value for name, value in settings.items()}
    script = [str(PROJECT / word) if word.endswith(".py") else word for word in command]
    ended = subprocess.run(
        [sys.executable, *script],
        env=environment | given | {"PYTHONPATH": str(PROJECT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("command", ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_no_process_repeats_a_secret_that_it_cannot_use(tmp_path: Path, command: list[str]) -> None:
    code, said = run(command, tmp_path, BAD)
    assert code != 0 and "service_secret" in said.lower(), said
    assert MARK not in said and "Traceback" not in said


def test_a_database_that_cannot_be_reached_is_named_without_its_password(tmp_path: Path) -> None:
    code, said = run(["-m", "store", "migrate"], tmp_path, {name: BAD[name] for name in ("DATABASE_DSN", "LOG_LEVEL")})
    assert code != 0 and "127.0.0.1:1" in said
    assert MARK not in said
