"""A ComfyUI server behind a proxy: below a path, with a token, a login or headers that nobody else sees."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from bridge.native import NativeServer as NativeClient
from bridge.required_settings import server_headers_by
from bridge.server import ServerUnavailable, UnexpectedAnswer
from runtime.required_settings import CannotStart
from runtime.settings import Settings
from tests.bridge.native import NativeServer
from tests.bridge.platform import BridgePlatform


def settings_with(**given: object) -> Settings:
    return Settings(_env_file=None, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "demanded"),
    [
        ({"gpu_server_token": SecretStr("a-token")}, "Authorization: Bearer a-token"),
        ({"gpu_server_login": SecretStr("me:a:password")}, "Authorization: Basic bWU6YTpwYXNzd29yZA=="),
        ({"gpu_server_headers": {"X-Api-Key": SecretStr("a-key")}}, "X-Api-Key: a-key"),
    ],
    ids=["token", "login", "headers"],
)
async def test_a_job_is_delivered_through_a_proxy_and_its_progress_is_heard(
    bridge: BridgePlatform, native: NativeServer, given: dict[str, object], demanded: str
) -> None:
    models = {"checkpoints": ["a.safetensors"]}
    await native.admin.set(proxy_path="/gpus/one", proxy_header=demanded, step_seconds=0.1, models=models)
    headers = server_headers_by(settings_with(**given))
    client = NativeClient(f"{native.url}/gpus/one/", headers=headers, read_seconds=1.0)
    async with client as server, bridge.gpu_of(server):
        job = await bridge.submit(template_id="text-to-image", extras={"seed": 1})
        state = await bridge.ended(job["job_id"])
    assert state["error_details"] is None, state
    assert len(await native.admin.sockets()) >= 1
    progress = [body["stage_progress"] for body in bridge.receiver.genuine(job["task_id"])]
    assert any(0 < percent < 100 for percent in progress), "no message of the WebSocket came through"


async def test_without_what_the_proxy_demands_the_sentence_names_the_settings(native: NativeServer) -> None:
    await native.admin.set(proxy_header="Authorization: Bearer a-token")
    async with NativeClient(native.url) as server:
        with pytest.raises(UnexpectedAnswer, match="GPU_SERVER_TOKEN"):
            await server.describe()


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match="GPU_SERVER_LOGIN") as refused:
        NativeClient("http://me:a-password@gpus.example")
    assert "a-password" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["ftp://gpus.example", "gpus.example:8188", "http://", "http://gpus.example/?a=b", "http://gpus.example?"]
)
def test_an_address_that_no_path_can_follow_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address of a ComfyUI server"):
        NativeClient(url)


def test_two_settings_for_one_header_are_refused_without_a_secret() -> None:
    given = {"gpu_server_token": SecretStr("a-token"), "gpu_server_login": SecretStr("me:a-password")}
    with pytest.raises(CannotStart, match="TOKEN and _LOGIN") as refused:
        server_headers_by(settings_with(**given))
    assert "a-token" not in str(refused.value)
    for wrong in ({"gpu_server_login": SecretStr("no-colon")}, {"gpu_server_token": SecretStr("two\nlines")}):
        with pytest.raises(CannotStart):
            server_headers_by(settings_with(**wrong))


@pytest.mark.parametrize(
    "given",
    [
        {"gpu_server_token": SecretStr("a-token ")},
        {"gpu_server_token": SecretStr("")},
        {"gpu_server_headers": {"X-Api-Key": SecretStr("a-token\t")}},
        {"gpu_server_headers": {"X-Api-Key": SecretStr("a-tokén")}},
    ],
    ids=str,
)
def test_a_header_that_cannot_be_sent_is_refused_at_the_start_without_a_secret(given: dict[str, object]) -> None:
    with pytest.raises(CannotStart, match="no header may have") as refused:
        server_headers_by(settings_with(**given))
    assert "a-tok" not in str(refused.value)


async def test_a_request_that_is_no_http_is_not_quoted(native: NativeServer) -> None:
    async with NativeClient(native.url, headers={"Authorization": "Bearer a-token\n"}) as server:
        with pytest.raises(ServerUnavailable) as refused:
            await server.describe()
    assert "a-token" not in str(refused.value)


def test_what_a_proxy_demands_is_hidden_in_logs() -> None:
    settings = settings_with(
        gpu_server_token=SecretStr("a-token"),
        gpu_server_login=SecretStr("me:a-password"),
        gpu_server_headers={"X-Api-Key": SecretStr("a-key")},
    )
    assert {"a-token", "a-password", "a-key"} <= set(settings.hidden_values)
    assert "a-key" not in repr(settings)
