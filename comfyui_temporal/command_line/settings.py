"""The command line's own settings: the addresses of Temporal and the gateway.

A setting is the command's flag if there is one, else the environment variable `COMFYUI_TEMPORAL_<NAME>`, else a line
of a `.env` file in the working directory.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from comfyui_temporal.encryption_keys import EncryptionKeys

PREFIX = "COMFYUI_TEMPORAL_"
AnySettings = TypeVar("AnySettings", bound=BaseSettings)


class CommandSettings(BaseSettings):
    """A command's settings. Secrets are `SecretStr`: printing the settings shows none."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_file=".env", extra="ignore")

    temporal_address: str | None = None
    """`host:port`; default: Temporal's environment configuration, else the local stack's, else localhost:7233."""
    temporal_namespace: str | None = None
    temporal_profile: str | None = None
    task_queue: str = TASK_QUEUE
    encryption_keys: EncryptionKeys | None = None
    """AES-256 keys for what Temporal holds, `id:base64`, comma-separated; see docs/encryption.md."""
    gateway_url: Annotated[str, Field(pattern=r"^https?://"), AfterValidator(lambda url: url.rstrip("/"))] | None = None
    """The gateway whose stream `watch`, `generate` and `train` follow; default: the local stack's, else tasks are
    followed by query."""
    gateway_token: SecretStr | None = None
    """The caller's token for it, with the scope `task.read`."""


FLAGS: Final = {
    "temporal_address": "--address",
    "temporal_namespace": "--namespace",
    "task_queue": "--task-queue",
    "gateway_url": "--gateway",
}
"""Setting → the flag that every command has for it."""
_given: dict[str, str] = {}
_verbose: list[bool] = []


def be_verbose(wanted: bool) -> None:
    """`-v`: the command says what it uses."""
    _verbose[:] = [wanted]


def is_verbose() -> bool:
    return any(_verbose)


def use_flags(**values: str | None) -> None:
    """Take over the flags of the command that is being run; None: one was not given."""
    _given.clear()
    _given.update({name: value for name, value in values.items() if value is not None})


def source_of(settings: BaseSettings, name: str) -> str | None:
    """Where a setting comes from: its flag, its variable or `.env`; None if it is not set."""
    if name in _given:
        return FLAGS[name]
    if name not in settings.model_fields_set:
        return None
    variable = PREFIX + name.upper()
    return variable if variable in os.environ else f"{variable} in .env"


def read_settings(kind: type[AnySettings]) -> AnySettings:
    """The settings of this process. Raises BadInput, which names each invalid variable and shows no value."""
    try:
        flags: dict[str, Any] = {name: value for name, value in _given.items() if name in kind.model_fields}
        return kind(**flags)
    except ValidationError as error:
        fields = {PREFIX + "_".join(map(str, issue["loc"])).upper(): issue["msg"] for issue in error.errors()}
        raise BadInput("Settings cannot be used.", fields) from None
