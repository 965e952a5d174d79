"""`python -m proof.conformance --url http://…`: check a server against the contract; exit code 1 if it breaks it.

It creates jobs and trainings there. Secrets come from the settings: `COMFYUI_TEMPORAL_SERVICE_SECRET` authenticates
service tokens, and the server signs callbacks with the first of `COMFYUI_TEMPORAL_CALLBACK_SECRETS`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Collection, Sequence

import jwt

from comfyui_temporal.contracts.permissions import Scope
from proof.conformance import Outcome, Person, Profile, TokenMaker, Unreachable, Verdict, cases, opened, run
from proof.conformance.receiver import CallbackReceiver, receiving
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings

_LIFETIME_SECONDS = 300
_MARKS = {Verdict.HELD: "ok    ", Verdict.NOT_OFFERED: "note  ", Verdict.BROKEN: "WRONG "}


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        settings = settings or read_settings()
    except CannotStart as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if settings.service_secret is None or settings.signing_secret is None:
        sys.stderr.write("Set COMFYUI_TEMPORAL_SERVICE_SECRET and COMFYUI_TEMPORAL_CALLBACK_SECRETS.\n")
        return 2
    try:
        outcomes = asyncio.run(_outcomes(options, settings))
    except Unreachable as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    for outcome in outcomes:
        sys.stdout.write(f"{_MARKS[outcome.verdict]}{outcome.case.name}: {outcome.case.title}\n")
        if outcome.says:
            sys.stdout.write(f"      {outcome.says}\n")
    return 1 if any(outcome.verdict is Verdict.BROKEN for outcome in outcomes) else 0


async def _outcomes(options: argparse.Namespace, settings: Settings) -> list[Outcome]:
    secret = settings.signing_secret
    assert secret is not None  # main has checked it
    profile = Profile(template_id=options.template, patience_seconds=options.patience)
    chosen = cases(with_trainings=not options.no_trainings)
    if options.only:
        chosen = [case for case in chosen if case.name in options.only]
    me, stranger = _person(options.me), _person(options.stranger)
    async with (
        receiving(CallbackReceiver(secret), host=options.host, port=options.port) as receiver,
        opened(options.url, _tokens_by(settings), me, stranger, profile, receiver) as subject,
    ):
        return await run(chosen, subject)


def _person(named: str) -> Person:
    tenant_id, _, user_id = named.partition("/")
    return Person(tenant_id, user_id)


def _tokens_by(settings: Settings) -> TokenMaker:
    """Service tokens with any scopes (contract §7)."""
    assert settings.service_secret is not None
    secret = settings.service_secret.get_secret_value()

    def make(person: Person, scopes: Collection[Scope]) -> str:
        now = int(time.time())
        claims = {
            "iss": settings.service_issuer,
            "aud": settings.service_audience,
            "iat": now,
            "exp": now + _LIFETIME_SECONDS,
            "tenant_id": person.tenant_id,
            "user_id": person.user_id,
            "scopes": [scope.value for scope in scopes],
        }
        return jwt.encode(claims, secret, algorithm="HS256")

    return make


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m proof.conformance", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", required=True, help="where /comfyui/v1 is served, e.g. http://127.0.0.1:8188")
    parser.add_argument("--me", default="tenant-demo/user-demo", help="tenant/user that jobs are made for")
    parser.add_argument("--stranger", default="tenant-other/user-other", help="tenant/user of another tenant")
    parser.add_argument("--template", default="test-pattern", help="the image template whose jobs are made")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that a job may take")
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine at which callbacks arrive")
    parser.add_argument("--port", type=int, default=0, help="its port; default: a free one")
    parser.add_argument("--no-trainings", action="store_true", help="images alone")
    parser.add_argument("--only", action="append", metavar="CASE", help="this case alone; may be given several times")
    return parser


if __name__ == "__main__":
    sys.exit(main())
