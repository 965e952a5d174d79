"""`doctor`: can this set-up run tasks? It reads, and cancels ids that cannot exist; it changes nothing.

The exception is `take_hold`, which runs only with --hold: one hold of 1 point, always given back.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from activities.comfyui import ComfyUIClient
from activities.credits import CreditsClient
from activities.outside_http import OutsideFailure
from activities.tokens import ServiceToken, SignedTokens, TokenMaker
from comfyui_temporal.command_line.connection import open_connection, sentences
from comfyui_temporal.command_line.failures import BadInput, CommandFailure
from comfyui_temporal.command_line.server import Server, user_of
from comfyui_temporal.command_line.settings import CommandSettings
from comfyui_temporal.contracts.calls import CallFor, Post
from comfyui_temporal.contracts.credits import MIN_HOLD_SECONDS, CancelHoldRequest, HoldReply, PreDeductRequest
from comfyui_temporal.contracts.errors import Answer
from comfyui_temporal.contracts.permissions import Scene, Scope
from comfyui_temporal.contracts.stack import StackDescription
from comfyui_temporal.contracts.worker_settings import WorkerSettings
from doctor.finding import Finding, note, ok, wrong
from doctor.finding import Verdict as FindingVerdict
from doctor.task_store import check_store
from doctor.temporal import check_temporal
from doctor.worker import ask_worker, compare
from proof import conformance
from proof.conformance import Outcome, Person, Unreachable, Verdict, cases, run
from proof.conformance import opened as conformant
from runtime.settings import Settings

NO_TOKEN = (
    "Set COMFYUI_TEMPORAL_SERVICE_SECRET (HS256, at least 32 bytes), or COMFYUI_TEMPORAL_SERVICE_TOKEN if only a "
    "static token is accepted."
)


@dataclass(frozen=True)
class Services:
    """The configured ComfyUI and credits services, and the tenant and user that the checks use."""

    comfyui: ComfyUIClient
    credits: CreditsClient
    call_for: CallFor
    tokens: TokenMaker


async def examine(settings: Settings, connecting: CommandSettings, server: Server) -> list[Finding]:
    """All findings. A party that cannot be reached is one finding; the other parties are still checked."""
    used: WorkerSettings | None = None
    try:
        opened = await open_connection(server, connecting)
        with sentences(opened):
            findings = await check_temporal(opened)
            if all(finding.what != "worker" or finding.verdict is FindingVerdict.OK for finding in findings):
                used = await ask_worker(opened)
                findings += compare(used, **_examined(settings, server.stack, used))
            findings += await check_store(opened, settings)
    except CommandFailure as failure:
        findings = [wrong("Temporal", failure.sentence, "")]
    try:
        async with services(settings, server.stack, used=used) as opened_services:
            findings += await check_credits(opened_services)
            findings += await check_comfyui(opened_services)
    except BadInput as failure:
        findings.append(wrong("services", failure.sentence, NO_TOKEN))
    return findings


@asynccontextmanager
async def services(
    settings: Settings,
    stack: StackDescription | None,
    *,
    tenant_id: str | None = None,
    user_id: str | None = None,
    used: WorkerSettings | None = None,
) -> AsyncIterator[Services]:
    """Clients by the settings, else by what the worker uses, else by the local stack.

    Raises BadInput without a token or with an invalid address.
    """
    addresses = _examined(settings, stack, used)
    tenant_id = tenant_id or (next(iter(stack.service_tokens), None) if stack else None) or "doctor"
    user_id = user_id or user_of(stack, tenant_id) or "doctor"
    call_for = CallFor(
        task_id=f"doctor-{secrets.token_hex(6)}", tenant_id=tenant_id, user_id=user_id, scene=Scene.IMAGE_GENERATE
    )
    tokens = _tokens(settings, stack, tenant_id)
    try:
        comfyui = ComfyUIClient(addresses["comfyui_url"], tokens)
        credits = CreditsClient(addresses["credits_url"], tokens)
    except ValueError as error:
        raise BadInput(str(error)) from None
    async with comfyui, credits:
        yield Services(comfyui, credits, call_for, tokens)


def _tokens(settings: Settings, stack: StackDescription | None, tenant_id: str) -> TokenMaker:
    if settings.service_token is not None:
        return ServiceToken(settings.service_token.get_secret_value())
    if settings.service_secret is not None:
        secret = settings.service_secret.get_secret_value()
        return SignedTokens(secret, issuer=settings.service_issuer, audience=settings.service_audience)
    if stack is not None and tenant_id in stack.service_tokens:
        return ServiceToken(stack.service_tokens[tenant_id])
    raise BadInput("There is no token to call ComfyUI and the credits service with.")


def _examined(settings: Settings, stack: StackDescription | None, used: WorkerSettings | None) -> dict[str, str]:
    """The addresses of both services: what is set wins, then the worker's own, the local stack's, the default."""

    def chosen(name: str) -> str:
        known = [settings] if name in settings.model_fields_set else [used, stack, settings]
        return str(getattr(next(one for one in known if one is not None), name))

    return {name: chosen(name) for name in ("comfyui_url", "credits_url")}


async def check_credits(opened: Services) -> list[Finding]:
    """Checks balance, ledger, and the cancel of a hold that cannot exist."""
    credits, call_for = opened.credits, opened.call_for
    account = f"{call_for.tenant_id} / {call_for.user_id}"
    unknown = f"{call_for.task_id}-unknown"
    cancel = Post[CancelHoldRequest](
        call_for=call_for,
        key=f"{call_for.task_id}:cancel:1",
        body=CancelHoldRequest(
            pre_deduct_id=unknown, tenant_id=call_for.tenant_id, user_id=call_for.user_id, reason="doctor"
        ),
    )
    balance = await _answer_of("credits: balance", credits.balance(call_for), "account_not_found")
    if not isinstance(balance, Answer):
        return [balance]  # not reached, or the token was rejected: the other calls would fail in the same way
    if balance.reply is None:
        first = note("credits: balance", f"{credits.address} answers; it has no account {account}")
    else:
        says = f"{credits.address} answers: {account} has {balance.reply.balance}, frozen {balance.reply.frozen}"
        first = ok("credits: balance", says)
    ledger = await _answer_of("credits: ledger", credits.ledger_page(call_for, limit=1), "account_not_found")
    unknown_hold = await _answer_of("credits: cancel", credits.cancel_hold(cancel), "pre_deduct_not_found")
    return [
        first,
        ledger if isinstance(ledger, Finding) else ok("credits: ledger", "answers by the contract"),
        unknown_hold if isinstance(unknown_hold, Finding) else _unknown_hold(unknown_hold),
    ]


def _unknown_hold(answer: Answer[Any]) -> Finding:
    if answer.refusal is not None:
        return ok("credits: cancel", "a hold that cannot exist is refused with pre_deduct_not_found")
    return wrong(
        "credits: cancel",
        "it answered the cancel of a hold that cannot exist as if it had been one",
        "The service must answer pre_deduct_not_found 40401 (contract §4), or lost holds stay unseen.",
    )


async def _answer_of(what: str, call: Awaitable[Answer[Any]], may_refuse: str) -> Answer[Any] | Finding:
    """The answer if it follows the contract, else a finding that describes it."""
    try:
        answer = await call
    except OutsideFailure as failure:
        return wrong(what, failure.sentence, "Correct the address or the service, and run doctor again.")
    if answer.refusal is not None and answer.refusal.message != may_refuse:
        return wrong(what, answer.refusal.sentence, "This call must be allowed for tasks to run.")
    return answer


async def check_comfyui(opened: Services) -> list[Finding]:
    """The contract's cases that change nothing: passed, not offered, or failed."""
    person = Person(opened.call_for.tenant_id, opened.call_for.user_id)
    chosen = cases(changes_nothing=True, with_scopes=isinstance(opened.tokens, SignedTokens))
    try:
        async with conformant(opened.comfyui.address, _with_scopes(opened.tokens), person) as subject:
            outcomes = await run(chosen, subject)
    except Unreachable as problem:
        return [wrong("ComfyUI", str(problem), "Correct the address or the service, and run doctor again.")]
    return [ok("ComfyUI", f"{opened.comfyui.address} answers"), *map(_finding_of, outcomes)]


def _finding_of(outcome: Outcome) -> Finding:
    what = f"ComfyUI: {outcome.case.title}"
    if outcome.verdict is Verdict.BROKEN:
        return wrong(what, outcome.says, "Tasks rely on this: correct the service.")
    if outcome.verdict is Verdict.NOT_OFFERED:
        return note(what, "not offered: treated as done, and recorded on each task")
    return ok(what, "as the contract says")


def _with_scopes(tokens: TokenMaker) -> conformance.TokenMaker:
    """Tokens for the cases. A static token is always the same, so the cases about scopes are left out with it."""

    def make(person: Person, scopes: Collection[Scope]) -> str:
        if isinstance(tokens, SignedTokens):
            return tokens.with_scopes(tenant_id=person.tenant_id, user_id=person.user_id, scopes=scopes)
        return tokens(tenant_id=person.tenant_id, user_id=person.user_id, scope=Scope.TASK_READ)

    return make


async def take_hold(opened: Services, template_id: str) -> list[Finding]:
    """One hold of 1 point, requested twice with one key: both answers must name the same hold. It is cancelled."""
    call_for = opened.call_for
    post = Post[PreDeductRequest](
        call_for=call_for,
        key=f"{call_for.task_id}:hold:1",
        body=PreDeductRequest(
            task_id=call_for.task_id,
            template_id=template_id,
            tenant_id=call_for.tenant_id,
            user_id=call_for.user_id,
            scene=call_for.scene,
            estimated_cost=1,
            expire_in=MIN_HOLD_SECONDS,
        ),
    )
    answers = [await _pre_deducted(opened.credits, post) for _ in range(2)]
    ids = list(dict.fromkeys(answer.pre_deduct_id for answer in answers if isinstance(answer, HoldReply)))
    findings = [answer for answer in answers if isinstance(answer, Finding)][:1]
    if not findings and len(ids) == 1:
        findings.append(ok("hold", f"two requests with one key made one hold, {ids[0]}"))
    elif len(ids) > 1:
        advice = "The service must compare X-Idempotency-Key (contract §4): every repeated call would be paid twice."
        findings.append(wrong("hold", f"one key, two holds: {', '.join(ids)}", advice))
    cancelled = [await _given_back(opened, pre_deduct_id, n) for n, pre_deduct_id in enumerate(ids, start=1)]
    return findings + cancelled


async def _pre_deducted(credits: CreditsClient, post: Post[PreDeductRequest]) -> HoldReply | Finding:
    try:
        answer = await credits.pre_deduct(post)
    except OutsideFailure as failure:
        advice = f"A hold of 1 point may be open; it ends by itself within {MIN_HOLD_SECONDS} s."
        return wrong("hold", failure.sentence, advice)
    if answer.reply is not None:
        return answer.reply
    sentence = answer.refusal.sentence if answer.refusal else "the service does not offer holds"
    return wrong("hold", sentence, "Nothing was held. Authorise tenant and user for this template, with a balance.")


async def _given_back(opened: Services, pre_deduct_id: str, n: int) -> Finding:
    call_for = opened.call_for
    body = CancelHoldRequest(
        pre_deduct_id=pre_deduct_id, tenant_id=call_for.tenant_id, user_id=call_for.user_id, reason="doctor"
    )
    post = Post[CancelHoldRequest](call_for=call_for, key=f"{call_for.task_id}:cancel:{n}", body=body)
    advice = f"It ends by itself within {MIN_HOLD_SECONDS} s; see the ledger."
    try:
        answer = await opened.credits.cancel_hold(post)
    except OutsideFailure as failure:
        return wrong("hold given back", failure.sentence, advice)
    if answer.refusal is not None:
        return wrong("hold given back", answer.refusal.sentence, advice)
    return ok("hold given back", f"{pre_deduct_id} is cancelled")
