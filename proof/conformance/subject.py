"""The server under test as cases see it: calls with the right token and key, and the platform's names for failures.

Broken        the answer is not what the contract says
├── NotOffered    a route marked (ours) that this server lacks, which contract §2 allows
└── Unreachable   no server answers, or our token is refused: no case can be judged
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from comfyui_temporal.contracts.comfyui import DatasetSnapshot, JobAccepted, JobState, TrainingAccepted, TrainingState
from comfyui_temporal.contracts.errors import COMFYUI_ERRORS, sentences_of
from comfyui_temporal.contracts.permissions import Scope
from runtime.http_transport import PatientClient

if TYPE_CHECKING:
    from proof.conformance.receiver import CallbackReceiver

Json = dict[str, Any]
ALL_SCOPES: Final = frozenset(Scope)
GLANCE_SECONDS: Final = 0.02
CALL_LIMIT_SECONDS: Final = 10.0
_CODES: Final = {row.message: row.code for row in COMFYUI_ERRORS}
Model = TypeVar("Model", bound=BaseModel)
Found = TypeVar("Found")


class Broken(Exception):
    """A sentence: what was expected, what was received."""


class NotOffered(Broken):
    """The route is one of (ours), and this server does not have it."""


class Unreachable(Broken):
    """No server answers at the address, or the token is refused."""


@dataclass(frozen=True)
class Person:
    tenant_id: str
    user_id: str


class TokenMaker(Protocol):
    """A bearer token of this person with these scopes; a static one where there is only that."""

    def __call__(self, person: Person, scopes: Collection[Scope]) -> str: ...


def _no_files(task_id: str) -> DatasetSnapshot:
    uri = f"file:///snapshots/{task_id}/cats/files/"
    return DatasetSnapshot(dataset_id="cats", snapshot_uri=uri, files=[])


@dataclass(frozen=True)
class Profile:
    """What this server offers, and how long it may take."""

    template_id: str = "test-pattern"
    extras: Json = field(default_factory=dict)
    resolution: str = "sd"
    base_model: str = "base"
    epochs: int = 3
    dataset: Callable[[str], DatasetSnapshot] = _no_files
    """The snapshot of a task, by its id."""
    patience_seconds: float = 30.0
    """How long a job, a training or a callback may take."""
    quiet_seconds: float = 2.0
    """A callback that does not come for this long counts as never sent; longer than its first repeat, 1 s."""


class Subject:
    """One server; calls are for `me`, and `stranger` is a user of another tenant."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        tokens: TokenMaker,
        me: Person,
        stranger: Person,
        profile: Profile,
        receiver: CallbackReceiver | None,
    ) -> None:
        self.me = me
        self.stranger = stranger
        self.profile = profile
        self._http = http
        self._tokens = tokens
        self._receiver = receiver

    @property
    def receiver(self) -> CallbackReceiver:
        assert self._receiver is not None, "cases that change something need a receiver of callbacks"
        return self._receiver

    def token(self, person: Person | None = None, scopes: Collection[Scope] = ALL_SCOPES) -> str:
        return self._tokens(person or self.me, scopes)

    async def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        person: Person | None = None,
        scopes: Collection[Scope] = ALL_SCOPES,
        authorization: str | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """One request below `/comfyui/v1`. `authorization` instead of a token, `""` for none at all.

        Raises Unreachable where there is no answer.
        """
        headers = {"Content-Type": "application/json"} if body is not None or content is not None else {}
        given = f"Bearer {self.token(person, scopes)}" if authorization is None else authorization
        if given:
            headers["Authorization"] = given
        if key is not None:
            headers["X-Idempotency-Key"] = key
        raw = content if content is not None else json.dumps(body).encode() if body is not None else None
        try:
            return await self._http.request(method, f"/comfyui/v1{path}", content=raw, headers=headers)
        except httpx.TransportError as error:
            address = str(self._http.base_url).rstrip("/")
            raise Unreachable(f"{address} does not answer {method} {path} ({type(error).__name__}).") from None

    async def get(self, path: str, **how: Any) -> httpx.Response:
        return await self.send("GET", path, **how)

    async def post(self, path: str, body: Any, key: str, **how: Any) -> httpx.Response:
        return await self.send("POST", path, body, key=key, **how)

    def job_body(self, task_id: str, **other: Any) -> Json:
        profile = self.profile
        return (
            self._ordered(task_id)
            | {
                "template_id": profile.template_id,
                "prompt": "a lighthouse at dusk",
                "controls": [],
                "resolution": profile.resolution,
                "priority": "standard",
                "extras": {"seed": secrets.randbelow(2**31)} | profile.extras,
            }
            | other
        )

    def training_body(self, task_id: str, **other: Any) -> Json:
        profile = self.profile
        return (
            self._ordered(task_id)
            | {
                "base_model": profile.base_model,
                "dataset": profile.dataset(task_id).model_dump(mode="json"),
                "hyperparameters": {"epochs": profile.epochs, "batch_size": 1, "learning_rate": 0.0001},
                "priority": "standard",
            }
            | other
        )

    def _ordered(self, task_id: str) -> Json:
        address = self._receiver.url if self._receiver is not None else "http://127.0.0.1:9"
        return {
            "task_id": task_id,
            "tenant_id": self.me.tenant_id,
            "user_id": self.me.user_id,
            "callback_url": f"{address}/callbacks/comfyui/{task_id}",
        }

    async def submit(self, task_id: str, **other: Any) -> JobAccepted:
        """A job that was accepted. Raises Broken."""
        answer = await self.post("/jobs", self.job_body(task_id, **other), f"{task_id}:submit:1")
        return accepted(answer, JobAccepted)

    async def create(self, task_id: str, **other: Any) -> TrainingAccepted:
        answer = await self.post("/training", self.training_body(task_id, **other), f"{task_id}:submit:1")
        return accepted(answer, TrainingAccepted)

    async def job(self, job_id: str) -> JobState:
        return read(await self.get(f"/jobs/{job_id}"), JobState)

    async def training(self, training_id: str) -> TrainingState:
        return read(await self.get(f"/training/{training_id}"), TrainingState)

    async def cancel_job(self, task_id: str, job_id: str, n: int = 1) -> JobState:
        return read(await self.post(f"/jobs/{job_id}/cancel", {}, f"{task_id}:cancel:{n}"), JobState, is_ours=True)

    async def start(self, task_id: str, training_id: str, n: int = 1) -> TrainingState:
        answer = await self.post(f"/training/{training_id}/start", {}, f"{task_id}:start:{n}")
        return read(answer, TrainingState, is_ours=True)

    async def cancel_training(self, task_id: str, training_id: str, n: int = 1) -> TrainingState:
        answer = await self.post(f"/training/{training_id}/cancel", {}, f"{task_id}:cancel:{n}")
        return read(answer, TrainingState, is_ours=True)

    async def fetched(self, url: str) -> tuple[str, int]:
        """Content type and bytes of what a result url gives. Raises Broken."""
        try:
            answer = await self._http.get(url)
        except httpx.TransportError as error:
            raise Broken(f"{url} cannot be fetched ({type(error).__name__})") from None
        demand(answer.status_code == 200, f"{url} answers {answer.status_code}")
        return answer.headers.get("content-type", ""), len(answer.content)

    async def ended_job(self, job_id: str) -> JobState:
        """Wait for the job's end, however it ends."""
        return await self.until(lambda: self.job(job_id), JobState.has_ended, f"the end of job {job_id}")

    async def ended_training(self, training_id: str) -> TrainingState:
        what = f"the end of training {training_id}"
        return await self.until(lambda: self.training(training_id), TrainingState.has_ended, what)

    async def until(self, look: Callable[[], Awaitable[Found]], is_it: Callable[[Found], bool], what: str) -> Found:
        """What `look` shows as soon as `is_it` holds. Raises Broken when it does not in time."""
        ends = time.monotonic() + self.profile.patience_seconds
        while not is_it(found := await look()):
            if time.monotonic() > ends:
                raise Broken(f"{what} did not come within {self.profile.patience_seconds:g} s; last seen: {found}")
            await asyncio.sleep(GLANCE_SECONDS)
        return found


@asynccontextmanager
async def opened(
    base_url: str,
    tokens: TokenMaker,
    me: Person,
    stranger: Person | None = None,
    profile: Profile | None = None,
    receiver: CallbackReceiver | None = None,
) -> AsyncIterator[Subject]:
    """The server at this address. Without a receiver only cases that change nothing can run."""
    async with PatientClient(base_url=base_url, timeout=CALL_LIMIT_SECONDS) as http:
        yield Subject(http, tokens, me, stranger or me, profile or Profile(), receiver)


def new_task() -> str:
    return f"conformance-{secrets.token_hex(6)}"


def demand(condition: object, sentence: str) -> None:
    """Raises Broken with the sentence where the condition does not hold."""
    if not condition:
        raise Broken(sentence)


def answered(answer: httpx.Response, status: int, *, is_ours: bool = False) -> Any:
    """The JSON of an answer of this status. Raises Broken or NotOffered."""
    if is_ours and not_offered(answer):
        raise NotOffered(f"{_request(answer)} answers {answer.status_code}: not offered")
    demand(answer.status_code == status, f"{_request(answer)}: expected {status}, got {_shown(answer)}")
    try:
        return answer.json()
    except ValueError:
        raise Broken(f"{_request(answer)}: the answer is no JSON: {_shown(answer)}") from None


def token_taken(answer: httpx.Response) -> httpx.Response:
    """The answer, unless it rejects our token. Raises Unreachable: no case can be judged then."""
    if answer.status_code == 401:
        raise Unreachable(f"{_request(answer)} does not take our token: {_shown(answer)}")
    return answer


def accepted(answer: httpx.Response, kind: type[Model]) -> Model:
    return _as(kind, answered(answer, 202), answer)


def read(answer: httpx.Response, kind: type[Model], *, is_ours: bool = False) -> Model:
    return _as(kind, answered(answer, 200, is_ours=is_ours), answer)


def refused(answer: httpx.Response, message: str, *, is_ours: bool = False) -> list[str]:
    """The `fields` of a refusal that is called this, with the contract's code. Raises Broken or NotOffered."""
    if is_ours and not_offered(answer):
        raise NotOffered(f"{_request(answer)} answers {answer.status_code}: not offered")
    try:
        detail = answer.json()["detail"]
        said, code, fields = detail["message"], detail["code"], detail.get("fields", [])
    except (ValueError, TypeError, KeyError):
        said = code = None
        fields = []
    is_it = answer.status_code >= 400 and (said, code) == (message, _CODES[message])
    expected = f"expected the refusal {message} {_CODES[message]}"
    demand(is_it, f"{_request(answer)}: {expected}, got {_shown(answer)}")
    return [str(line) for line in fields]


def not_offered(answer: httpx.Response) -> bool:
    """404 without our error body, 405 or 501 (contract §2)."""
    if answer.status_code in (405, 501):
        return True
    if answer.status_code != 404:
        return False
    try:
        return not isinstance(answer.json()["detail"]["message"], str)
    except (ValueError, TypeError, KeyError):
        return True


def _as(kind: type[Model], body: Any, answer: httpx.Response) -> Model:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise Broken(f"{_request(answer)}: {'; '.join(sentences_of(error))}") from None


def _request(answer: httpx.Response) -> str:
    return f"{answer.request.method} {answer.request.url.path}"


def _shown(answer: httpx.Response) -> str:
    return f"{answer.status_code} {answer.text[:300]}".strip()
