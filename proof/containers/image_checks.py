"""What the image holds, and what a container of it may do."""

from __future__ import annotations

import json
import re
import subprocess
import time
from functools import partial
from typing import Final

from proof.containers.project import PREFIX, Project
from proof.containers.report import Report, in_time, must

MAX_MEGABYTES: Final = 350
REFUSED_SECONDS: Final = 5.0
NOT_WANTED: Final = ("pytest", "hypothesis", "mypy", "ruff", "playwright", "uv", "tests", "proof.simulators")
LABELS: Final = ("title", "description", "licenses", "version", "revision")
_UNCOMPILED: Final = """
import importlib.util, pathlib
sources = [path for root in ("/app", "/packages") for path in pathlib.Path(root).rglob("*.py")]
print(sum(not pathlib.Path(importlib.util.cache_from_source(str(path))).exists() for path in sources), len(sources))
"""
_IMPORTABLE: Final = """
import importlib.util, sys
def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
print(*[name for name in sys.argv[1:] if there(name)])
"""


def check_image(project: Project, report: Report) -> None:
    """Of the image that worker, gateway, bridge and the others share."""
    image = project.image_of("worker")

    def size() -> str:
        megabytes = int(project.engine.inspected(image, "{{.Size}}")) / 1e6
        must(megabytes <= MAX_MEGABYTES, f"{megabytes:.0f} MB, more than {MAX_MEGABYTES}")
        return f"{megabytes:.0f} MB, of at most {MAX_MEGABYTES}"

    def described() -> str:
        config = json.loads(project.engine.inspected(image, "{{json .Config}}"))
        must(re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"]), f"its user is {config['User']!r}, no number")
        must("startupz" in str(config.get("Healthcheck")), "it has no health check")
        labels = config.get("Labels") or {}
        missing = [name for name in LABELS if not labels.get(f"org.opencontainers.image.{name}")]
        must(not missing, f"labels are missing: {missing}")
        return f"user {config['User']}, a health check, {len(LABELS)} labels"

    def lean() -> str:
        found = _python(project, image, _IMPORTABLE, *NOT_WANTED)
        must(not found, f"it holds {found}")
        return f"none of {', '.join(NOT_WANTED)}"

    def compiled() -> str:
        without, sources = _python(project, image, _UNCOMPILED).split()
        must(without == "0", f"{without} of {sources} modules are not compiled")
        return f"all {sources} modules"

    report.check("the image is small", size)
    report.check("the image says who it is", described)
    report.check("no test tool is in it", lean)
    report.check("bytecode is compiled", compiled)


def check_confinement(project: Project, report: Report) -> None:
    """Of containers that run."""

    def confined() -> str:
        for service in ("worker", "gateway"):
            container = project.container(service)
            status = project.engine.run("exec", container, "cat", "/proc/self/status").stdout
            seen = dict(re.findall(r"^(Uid|CapEff|CapBnd|NoNewPrivs):\s+(\S+)", status, re.MULTILINE))
            wanted = {"Uid": "10001", "CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}
            must(seen == wanted, f"{service}: {seen}")
            for path in ("/app/x", "/packages/x", "/etc/x", "/x"):
                done = project.engine.run("exec", container, "sh", "-c", f"echo > {path}", check=False)
                must(done.returncode != 0, f"{service} can write {path}")
            project.engine.run("exec", container, "sh", "-c", "echo > /tmp/x && echo > /data/x && rm /data/x")
        return "user 10001, no capability, no new privilege; /tmp and /data can be written, /app, /packages, / not"

    report.check("containers may do nothing else", confined)


def check_refusals(project: Project, report: Report) -> None:
    """A wrong setting ends the process at once, with one sentence. On a stack that runs."""
    cases = {
        "a secret that is too short": ("worker", {"SERVICE_SECRET": "short"}, "service_secret"),
        "a namespace that is not there": ("worker", {"TEMPORAL_NAMESPACE": "nowhere"}, "nowhere"),
        "no Temporal at the address": ("worker", {"TEMPORAL_ADDRESS": "127.0.0.1:9"}, "127.0.0.1:9"),
        "no key for callers' tokens": ("gateway", {"CALLER_SECRET": "short"}, "caller_secret"),
    }
    for name, (service, changed, word) in cases.items():
        report.check(f"refused: {name}", partial(_refused, project, service, changed, word))


def _refused(project: Project, service: str, changed: dict[str, str], word: str) -> str:
    given = [part for name, value in changed.items() for part in ("--env", f"{PREFIX}{name}={value}")]
    began = time.monotonic()
    done = project.compose("run", "--rm", "--no-deps", *given, service, check=False, within_seconds=60)
    seconds = time.monotonic() - began
    sentences = [line for line in done.stderr.splitlines() if word in line]
    must(done.returncode == 2, f"exit code {done.returncode}: {done.stderr[-400:]}")
    must(len(sentences) == 1, f"not one sentence: {done.stderr[-400:]}")
    must("Traceback" not in done.stderr, f"a traceback: {done.stderr[-400:]}")
    return f"exit code 2 after {seconds:.1f} s ({in_time(seconds, REFUSED_SECONDS)}): {sentences[0][:160]}"


def _python(project: Project, image: str, code: str, *arguments: str) -> str:
    done: subprocess.CompletedProcess[str] = project.engine.run(
        "run", "--rm", "--network", "none", "--read-only", image, "python", "-c", code, *arguments
    )
    return done.stdout.strip()
