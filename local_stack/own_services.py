"""Services of the user's own behind a local stack: what the environment or `.env` names is used, never simulated.

`make up CREDITS=http://…` and `COMFYUI=http://…` are the same as flags; a flag counts as set in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import httpx
from dotenv import dotenv_values

from store.database import address_of

PREFIX: Final = "COMFYUI_TEMPORAL_"
CREDITS_URL: Final = PREFIX + "CREDITS_URL"
COMFYUI_URL: Final = PREFIX + "COMFYUI_URL"
TASK_QUEUE: Final = PREFIX + "TASK_QUEUE"
DATABASE_SETTING: Final = PREFIX + "DATABASE_DSN"
_TOKENS: Final = tuple(
    PREFIX + name for name in ("SERVICE_SECRET", "SERVICE_TOKEN", "SERVICE_ISSUER", "SERVICE_AUDIENCE")
)
_OWN: Final = (CREDITS_URL, COMFYUI_URL, TASK_QUEUE)
_IGNORED: Final = (
    *("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_PROFILE"),
    *(PREFIX + name for name in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_PROFILE")),
)
LOOK_SECONDS: Final = 3.0


def read_dotenv() -> None:
    """Take what `.env` names of one's own services. The parts themselves do not read it: they run in `.run`."""
    for name, value in dotenv_values(".env").items():
        if name in (*_OWN, *_TOKENS) and value:
            os.environ.setdefault(name, value)


def own_url(setting: str) -> str | None:
    """The address of one's own service; None: it is simulated, or it is ComfyUI behind the bridge."""
    return (os.environ.get(setting) or "").rstrip("/") or None


def tokens_of_own_services() -> dict[str, str]:
    """The settings of service tokens, by which one's own services know us; empty if both are ours."""
    if own_url(CREDITS_URL) is None and own_url(COMFYUI_URL) is None:
        return {}
    return {name: os.environ[name] for name in _TOKENS if os.environ.get(name)}


def sentences() -> Iterator[str]:
    """What is set and used, and what is set and not used, before anything starts."""
    for setting, what in ((CREDITS_URL, "credits service"), (COMFYUI_URL, "ComfyUI service")):
        if (url := own_url(setting)) is not None:
            yield f"Your own {what} is used, {url} ({setting}): its points and jobs are real."
    if dsn := os.environ.get(DATABASE_SETTING):
        yield (
            f"Your own PostgreSQL is used, {_address(dsn)} ({DATABASE_SETTING}): its tables are migrated to this "
            "version, unless they belong to another Temporal."
        )
    for name in _IGNORED:
        if os.environ.get(name):
            yield f"{name} is set and not used: the local stack has a Temporal of its own, namespace 'default'."


def _address(dsn: str) -> str:
    try:
        return address_of(dsn)
    except ValueError:
        return "which is no address of PostgreSQL"


def silent_services() -> Iterator[str]:
    """A sentence for each of one's own services that does not answer at all."""
    for setting, what in ((CREDITS_URL, "credits service"), (COMFYUI_URL, "ComfyUI service")):
        url = own_url(setting)
        if url is None:
            continue
        try:
            httpx.get(url, timeout=LOOK_SECONDS, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            yield f"The {what} at {url} does not answer ({str(error) or type(error).__name__}): start it."
