"""Cases that change nothing: reads of ids that cannot exist, and tokens that must be refused."""

from __future__ import annotations

import secrets
from typing import Final

from pydantic import TypeAdapter, ValidationError

from comfyui_temporal.contracts.comfyui import GpuPool
from comfyui_temporal.contracts.errors import sentences_of
from proof.conformance.cases import Case, add_case, case
from proof.conformance.subject import Subject, answered, demand, refused, token_taken

_POOLS: Final = TypeAdapter(list[GpuPool])
_ODD_ID: Final = "no%20such%3Ajob"


@case("GET /comfyui/v1/gpus", changes_nothing=True)
async def gpus_are_listed(subject: Subject) -> None:
    body = answered(token_taken(await subject.get("/gpus")), 200, is_ours=True)
    try:
        pools = _POOLS.validate_python(body)
    except ValidationError as error:
        demand(False, f"GET /comfyui/v1/gpus: {'; '.join(sentences_of(error))}")
        return
    for pool in pools:
        demand(pool.available <= pool.total, f"{pool.gpu_type}: {pool.available} available of {pool.total}")


def _unknown(name: str, method: str, path: str, refusal: str, step: str | None, *, is_ours: bool) -> None:
    """A case that reads an id that cannot exist; it must be refused by name."""

    async def check(subject: Subject) -> None:
        unknown = f"probe-{secrets.token_hex(16)}"
        body: dict[str, str] | None = {} if method == "POST" else None
        key = f"{unknown}:{step}:1" if step else None
        answer = await subject.send(method, path.format(unknown), body, key=key)
        refused(token_taken(answer), refusal, is_ours=is_ours)

    title = f"{method} /comfyui/v1{path.format('{' + 'job_id' + '}')}"
    add_case(Case(name, title, check, changes_nothing=True, trains=path.startswith("/training")))


for _name, _method, _path, _refusal, _step, _is_ours in (
    ("an_unknown_job_is_told", "GET", "/jobs/{}", "job_not_found", None, False),
    ("an_unknown_job_is_not_cancelled", "POST", "/jobs/{}/cancel", "job_not_found", "cancel", True),
    ("an_unknown_training_is_told", "GET", "/training/{}", "training_not_found", None, False),
    ("an_unknown_training_is_not_started", "POST", "/training/{}/start", "training_not_found", "start", True),
    ("an_unknown_training_is_not_cancelled", "POST", "/training/{}/cancel", "training_not_found", "cancel", True),
):
    _unknown(_name, _method, _path, _refusal, _step, is_ours=_is_ours)


@case("an id of odd characters is an unknown id", changes_nothing=True)
async def an_odd_id_is_unknown(subject: Subject) -> None:
    refused(token_taken(await subject.get(f"/jobs/{_ODD_ID}")), "job_not_found")


@case("no token, no entry", changes_nothing=True)
async def no_token_no_entry(subject: Subject) -> None:
    for path in ("/gpus", "/jobs/x"):
        for authorization in ("", "Bearer", "Bearer x.y.z", "Basic eDp5"):
            answer = await subject.get(path, authorization=authorization)
            says = f"GET {path} with {authorization or 'no token'!r}: expected 401 or 403, got {answer.status_code}"
            demand(answer.status_code in (401, 403), says)


@case("a token without the scope may not read", changes_nothing=True, needs_scopes=True)
async def a_token_without_scope_may_not_read(subject: Subject) -> None:
    refused(await subject.get("/jobs/x", scopes=()), "authorization_missing")
