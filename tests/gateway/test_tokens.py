"""Who is let in: real tokens against the verifier, real keys behind a real JWKS address."""

from __future__ import annotations

import asyncio
import base64
import json
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import Depends, FastAPI, WebSocket
from fastapi.testclient import TestClient
from jwt.algorithms import get_default_algorithms
from starlette.testclient import WebSocketDenialResponse

from comfyui_temporal.contracts.permissions import Operation, Scope
from gateway.access import TOKEN_COOKIE
from gateway.problems import answer_with_problems
from gateway.tokens import StreamTokens
from runtime import caller_tokens
from runtime.caller_tokens import Caller, CallerTokens, KeySet, SharedSecret, TokenRefused, TokensUnverifiable
from runtime.required_settings import caller_tokens_by
from runtime.settings import Settings
from tests.gateway.serving import AUDIENCE, ISSUER, TOKEN_SECRET, bearer, new_access, token_for

CALLERS = CallerTokens(SharedSecret(TOKEN_SECRET), issuer=ISSUER, audience=AUDIENCE)


def raw_token(header: bytes, payload: bytes, signature: bytes = b"x") -> str:
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (header, payload, signature))


async def test_a_token_names_tenant_user_scopes_and_its_end() -> None:
    caller = await CALLERS.read(token_for("tenant-a", "user-a", [Scope.TASK_READ, "scope.unknown"], valid_seconds=60))

    assert (caller.tenant_id, caller.user_id) == ("tenant-a", "user-a")
    assert caller.allows(Operation.READ_TASK)
    assert not caller.allows(Operation.CANCEL_TASK)
    assert 55 < caller.expires_at - time.time() <= 60
    assert not caller.is_for_streams


BAD_TOKENS: dict[str, str] = {
    "expired": token_for(valid_seconds=-60),
    "not yet valid": token_for(nbf=int(time.time()) + 600),
    "without expiry": token_for(exp=None),
    "without issuer": token_for(iss=None),
    "without audience": token_for(aud=None),
    "of another issuer": token_for(iss="another"),
    "for another audience": token_for(aud="something"),
    "signed with another secret": token_for(secret="another secret, also longer than 32 bytes"),
    "without tenant": token_for(tenant_id=None),
    "with a tenant that no id may be": token_for(tenant_id="tenant a"),
    "with a tenant that is a list": token_for(tenant_id=["tenant-a"]),
    "with an instant that is a text": token_for(iat="yesterday"),
    "with an endless expiry": token_for(exp=10**400),
    "with an infinite expiry": token_for(exp=float("inf")),
    "unsigned": jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "exp": 2**31}, "", algorithm="none"),
    "of another algorithm": jwt.encode(
        {"iss": ISSUER, "aud": AUDIENCE, "exp": 2**31, "tenant_id": "t", "user_id": "u"},
        TOKEN_SECRET * 2,
        algorithm="HS512",
    ),
    "too long": token_for(padding="x" * 9000),
    "no token": "hello",
    "empty": "",
    "not ascii": "é.é.é",
    "nested too deep": raw_token(b'{"alg":"HS256","x":' + b"[" * 3000 + b"]" * 3000 + b"}", b"{}"),
    "with a header that is no object": raw_token(b"[]", b"{}"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
async def test_a_bad_token_is_refused_and_never_an_error_of_ours(name: str) -> None:
    with pytest.raises(TokenRefused):
        await CALLERS.read(BAD_TOKENS[name])


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SharedSecret("short")


# Stream tokens


async def test_a_stream_token_opens_streams_only_and_expires_with_its_makers_token() -> None:
    streams = StreamTokens(TOKEN_SECRET)
    maker = await CALLERS.read(token_for(valid_seconds=30))

    read = streams.read(streams.made_for(maker))

    assert read is not None
    assert read.is_for_streams
    assert read.scopes == [Scope.TASK_READ]
    assert read.expires_at == maker.expires_at
    with pytest.raises(TokenRefused):
        await CALLERS.read(streams.made_for(maker))
    assert StreamTokens("another secret, also longer than 32 bytes").read(streams.made_for(maker)) is None
    assert streams.read(token_for()) is None


# Key sets


class KeyServer:
    """A JWKS address on loopback."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        await self.answers.wait()
        body = json.dumps({"keys": self.keys}).encode()
        writer.write(f"HTTP/1.1 {self.status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"


KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}


def public_jwk(algorithm: str, key_id: str) -> dict[str, Any]:
    jwk = get_default_algorithms()[algorithm].to_jwk(KEYS[algorithm].public_key(), as_dict=True)
    return {**jwk, "kid": key_id, "alg": algorithm, "use": "sig"}


def signed(algorithm: str, key_id: str | None) -> str:
    claims = jwt.decode(token_for(), options={"verify_signature": False})
    return jwt.encode(claims, KEYS[algorithm], algorithm=algorithm, headers={"kid": key_id} if key_id else None)


@pytest.mark.parametrize("algorithm", KEYS)
async def test_a_token_of_the_key_set_is_taken(algorithm: str) -> None:
    server = KeyServer()
    server.keys = [public_jwk(algorithm, "key-1")]
    async with server.served() as url:
        callers = CallerTokens(KeySet(url), issuer=ISSUER, audience=AUDIENCE)
        for _ in range(3):
            assert (await callers.read(signed(algorithm, "key-1"))).tenant_id == "tenant-a"
    assert server.asked == 1


async def test_a_public_key_is_no_shared_secret() -> None:
    """The classic confusion: HS256 with the public key's text, which everybody knows."""
    server = KeyServer()
    server.keys = [public_jwk("RS256", "key-1")]
    pem = KEYS["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    claims = jwt.decode(token_for(), options={"verify_signature": False})
    header = json.dumps({"alg": "HS256", "kid": "key-1"}).encode()
    unsigned = raw_token(header, json.dumps(claims).encode()).rpartition(".")[0]
    forged = get_default_algorithms()["HS256"].sign(unsigned.encode(), pem)
    token = f"{unsigned}.{base64.urlsafe_b64encode(forged).decode().rstrip('=')}"
    async with server.served() as url:
        with pytest.raises(TokenRefused):
            await CallerTokens(KeySet(url), issuer=ISSUER, audience=AUDIENCE).read(token)


async def refusal_by(jwk: dict[str, Any], token: str) -> str | None:
    """How a set with this key and a good one refuses the token. A token of the good one is taken all the same."""
    server = KeyServer()
    server.keys = [jwk, public_jwk("EdDSA", "good")]
    async with server.served() as url:
        callers = CallerTokens(KeySet(url), issuer=ISSUER, audience=AUDIENCE)
        assert (await callers.read(signed("EdDSA", "good"))).tenant_id == "tenant-a"
        try:
            await callers.read(token)
        except TokenRefused as refused:
            return str(refused)
    return None


def signed_as(algorithm: str, key: Any) -> str:
    claims = jwt.decode(token_for(), options={"verify_signature": False})
    return jwt.encode(claims, key, algorithm=algorithm, headers={"kid": "key-1"})


async def test_a_key_is_used_with_its_own_algorithm_only() -> None:
    jwk, rsa_key = public_jwk("RS256", "key-1"), KEYS["RS256"]
    for declared, used, is_refused in (
        ("RS256", "RS256", False),
        ("RS256", "PS256", True),
        ("PS256", "PS256", False),
        ("PS256", "RS256", True),
        ("RS512", "RS512", True),
        (None, "RS256", False),
        (None, "PS256", False),
        (None, "RS384", True),
    ):
        described = {name: value for name, value in {**jwk, "alg": declared}.items() if value is not None}
        refusal = await refusal_by(described, signed_as(used, rsa_key))
        assert (refusal is not None) is is_refused, (declared, used)


async def test_a_weak_or_secret_key_of_a_set_opens_nothing() -> None:
    algorithms = get_default_algorithms()
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    curve = ec.generate_private_key(ec.SECP384R1())
    shared = base64.urlsafe_b64encode(TOKEN_SECRET.encode()).decode().rstrip("=")
    rs256, es384 = algorithms["RS256"], algorithms["ES384"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library: the key is too short
        weak_token = signed_as("RS256", weak)
    for jwk, token in (
        (rs256.to_jwk(weak.public_key(), as_dict=True), weak_token),
        (es384.to_jwk(curve.public_key(), as_dict=True), signed_as("ES384", curve)),
        ({"kty": "oct", "k": shared}, signed_as("HS256", TOKEN_SECRET)),
        (rs256.to_jwk(KEYS["RS256"], as_dict=True), signed_as("RS256", KEYS["RS256"])),
        ({**public_jwk("RS256", "key-1"), "use": "enc"}, signed_as("RS256", KEYS["RS256"])),
    ):
        refusal = await refusal_by({**jwk, "kid": "key-1"}, token)
        assert refusal is not None and "not in the key set" in refusal, jwk["kty"]


async def test_a_token_that_lives_too_long_is_refused() -> None:
    callers = CallerTokens(SharedSecret(TOKEN_SECRET), issuer=ISSUER, audience=AUDIENCE, max_seconds=600)
    assert (await callers.read(token_for(valid_seconds=600))).tenant_id == "tenant-a"
    long = token_for(valid_seconds=300, iat=int(time.time()) - 400)
    for token, reason in ((long, "longer than 600 s"), (token_for(iat=None), "iat")):
        with pytest.raises(TokenRefused, match=reason):
            await callers.read(token)
        assert (await CALLERS.read(token)).tenant_id == "tenant-a"


def platform_token(**claims: Any) -> str:
    """As a platform makes them: tenant, scopes and expiry alone, under its own names."""
    return jwt.encode({"exp": int(time.time()) + 300, **claims}, TOKEN_SECRET, algorithm="HS256")


PLATFORM = Settings(
    _env_file=None,
    caller_secret=TOKEN_SECRET,
    caller_issuer="",
    caller_audience="",
    caller_tenant_claim="org.id",
    caller_scopes_claim="scope",
    caller_default_user="everybody",
    caller_scope_meanings={"task.manage": ["task.read", "task.cancel"], "tasks.push": ["task.read"]},
)


async def test_tokens_that_name_only_tenant_scopes_and_expiry_are_read_by_settings() -> None:
    callers = caller_tokens_by(PLATFORM)
    caller = await callers.read(platform_token(org={"id": "tenant-a"}, scope="task.manage comfyui.image.generate"))
    assert (caller.tenant_id, caller.user_id) == ("tenant-a", "everybody")
    assert all(caller.allows(one) for one in (Operation.READ_TASK, Operation.CANCEL_TASK, Operation.START_IMAGE_TASK))
    assert not caller.allows(Operation.ROLL_BACK) and not caller.allows(Operation.START_TRAINING_TASK)
    named = await callers.read(platform_token(org={"id": "tenant-a"}, scope=["tasks.push"], user_id="ann"))
    assert named.user_id == "ann" and named.allows(Operation.READ_TASK)


@pytest.mark.parametrize(
    "claims",
    [
        {"scope": "task.read"},
        {"scope": "task.read", "tenant_id": "tenant-a"},
        {"scope": "task.read", "org": {"name": "tenant-a"}},
        {"scope": "task.read", "org": "tenant-a"},
        {"scope": "task.read", "org": {"id": "*"}},
        {"scope": "task.read", "org": {"id": ["tenant-a"]}},
    ],
)
async def test_a_token_without_the_claim_that_names_the_tenant_is_trusted_as_none(claims: dict[str, Any]) -> None:
    with pytest.raises(TokenRefused, match=r"org\.id"):
        await caller_tokens_by(PLATFORM).read(platform_token(**claims))


async def test_a_wider_scope_means_nothing_unless_a_setting_says_so() -> None:
    caller = await CALLERS.read(token_for(scopes=["admin.full", "task.manage"]))
    assert not any(caller.allows(operation) for operation in Operation)
    with pytest.raises(TokenRefused, match="user_id"):
        await caller_tokens_by(
            Settings(_env_file=None, caller_secret=TOKEN_SECRET, caller_issuer="", caller_audience="")
        ).read(platform_token(tenant_id="tenant-a", scopes=[]))


async def test_rotated_keys_are_fetched_and_unknown_key_ids_cause_no_flood_of_requests() -> None:
    server, now = KeyServer(), 1000.0
    server.keys = [public_jwk("ES256", "old")]
    async with server.served() as url:
        callers = CallerTokens(KeySet(url, clock=lambda: now), issuer=ISSUER, audience=AUDIENCE)
        await callers.read(signed("ES256", "old"))
        for _ in range(20):
            with pytest.raises(TokenRefused):
                await callers.read(signed("EdDSA", "new"))
        assert server.asked == 1

        now += 11
        server.keys.append(public_jwk("EdDSA", "new"))
        await callers.read(signed("EdDSA", "new"))
        with pytest.raises(TokenRefused, match="names no key"):
            await callers.read(signed("EdDSA", None))

        now += 301
        server.status = 500
        assert (await callers.read(signed("ES256", "old"))).tenant_id == "tenant-a"


async def test_callers_with_a_known_key_do_not_wait_for_a_silent_key_server() -> None:
    server, now = KeyServer(), 1000.0
    server.keys = [public_jwk("ES256", "old")]
    async with server.served() as url:
        callers = CallerTokens(KeySet(url, clock=lambda: now), issuer=ISSUER, audience=AUDIENCE)
        await callers.read(signed("ES256", "old"))
        server.answers.clear()
        for _ in range(3):
            now += 301
            began = time.monotonic()
            for _ in range(10):
                assert (await callers.read(signed("ES256", "old"))).tenant_id == "tenant-a"
            await asyncio.gather(*(callers.read(signed("ES256", "old")) for _ in range(10)))
            assert time.monotonic() - began < 3.0, "less than the five seconds that the server is waited for"
        server.answers.set()


async def test_a_key_server_that_drips_or_floods_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller_tokens, "JWKS_TIMEOUT_SECONDS", 0.5)

    async def drips(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        with suppress(OSError):
            for _ in range(100):
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()

    server = await asyncio.start_server(drips, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks"
    began = time.monotonic()
    with pytest.raises(TokensUnverifiable):
        await CallerTokens(KeySet(url), issuer=ISSUER, audience=AUDIENCE).read(signed("RS256", "key-1"))
    assert time.monotonic() - began < 5.0
    server.close()


@pytest.mark.parametrize(
    "answer", [{"status": 500}, {"keys": ["nonsense"]}, {"keys": [{"kty": "RSA", "kid": "key-1"}]}]
)
async def test_a_token_is_unverifiable_without_usable_keys(answer: dict[str, Any]) -> None:
    server = KeyServer()
    vars(server).update(answer)
    async with server.served() as url:
        with pytest.raises(TokensUnverifiable, match="jwks"):
            await CallerTokens(KeySet(url), issuer=ISSUER, audience=AUDIENCE).read(signed("RS256", "key-1"))


# The dependencies


@pytest.fixture(scope="module")
def http() -> TestClient:
    access = new_access(allowed_origins=["https://app.example"])
    app = FastAPI()
    answer_with_problems(app)

    @app.post("/cancel")
    async def cancel(caller: Caller = Depends(access.requires(Operation.CANCEL_TASK))) -> str:  # noqa: B008
        return caller.tenant_id

    @app.get("/stream")
    async def stream(caller: Caller = Depends(access.requires_for_stream())) -> str:  # noqa: B008
        return caller.tenant_id

    @app.websocket("/ws")
    async def ws(websocket: WebSocket, caller: Caller = Depends(access.requires_for_stream())) -> None:  # noqa: B008
        await websocket.accept()
        await websocket.send_text(caller.tenant_id)
        await websocket.close()

    return TestClient(app, base_url="http://gateway.example")


def test_a_request_without_a_token_is_answered_401(http: TestClient) -> None:
    for answer in (
        http.post("/cancel"),
        http.get("/stream"),
        http.post("/cancel", headers={"Authorization": "Basic x"}),
    ):
        assert answer.status_code == 401
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["www-authenticate"].startswith("Bearer ")
        assert answer.json()["code"] == "unauthenticated"
    with pytest.raises(WebSocketDenialResponse) as denied, http.websocket_connect("/ws"):
        pass
    assert denied.value.status_code == 401


def test_a_token_needs_the_operations_scope(http: TestClient) -> None:
    assert http.post("/cancel", headers=bearer(token_for(scopes=[Scope.TASK_CANCEL]))).json() == "tenant-a"
    lacking = http.post("/cancel", headers=bearer(token_for(scopes=[Scope.TASK_READ])))
    assert (lacking.status_code, lacking.json()["code"]) == (403, "not_authorized")
    assert "task.cancel" in lacking.json()["detail"]


async def test_an_address_holds_a_stream_token_and_no_other_and_a_cookie_any(http: TestClient) -> None:
    token = token_for()
    streams_only = StreamTokens(TOKEN_SECRET).made_for(await CALLERS.read(token))
    cookie = {"Cookie": f"{TOKEN_COOKIE}={token}"}

    assert http.get("/stream", headers=cookie).json() == "tenant-a"
    assert http.post("/cancel", headers=cookie).status_code == 401
    with http.websocket_connect(f"/ws?token={streams_only}") as websocket:
        assert websocket.receive_text() == "tenant-a"
    for headers in ({}, cookie, bearer(token)):
        assert http.get(f"/stream?token={streams_only}", headers=headers).json() == "tenant-a"
        assert http.post(f"/cancel?token={streams_only}", headers=headers).status_code == 401
        for in_address in (f"token={token}", f"token={streams_only}&token={token}"):
            assert http.post(f"/cancel?{in_address}", headers=headers).status_code == 401
            refused = http.get(f"/stream?{in_address}", headers=headers)
            assert (refused.status_code, token in refused.text) == (401, False)
            assert "stream/config" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://app.example", 200), ("http://gateway.example", 200), ("https://evil.example", 403), ("null", 403)],
)
def test_the_cookie_is_taken_from_allowed_origins_only(http: TestClient, origin: str, status: int) -> None:
    headers = {"Cookie": f"{TOKEN_COOKIE}={token_for()}", "Origin": origin}
    assert http.get("/stream", headers=headers).status_code == status


async def test_a_stream_token_opens_a_stream_and_nothing_else(http: TestClient) -> None:
    token = StreamTokens(TOKEN_SECRET).made_for(await CALLERS.read(token_for()))

    assert http.get(f"/stream?token={token}").json() == "tenant-a"
    refused = http.post("/cancel", headers=bearer(token))
    assert (refused.status_code, refused.json()["code"]) == (403, "not_authorized")
