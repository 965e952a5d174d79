"""The command line's own settings: the addresses of Temporal and the gateway.

Environment variables `COMFYUI_TEMPORAL_<NAME>`; a `.env` file in the working directory is read too.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

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


def read_settings(kind: type[AnySettings]) -> AnySettings:
    """The settings of this process. Raises BadInput, which names each invalid variable and shows no value."""
    try:
        return kind()
    except ValidationError as error:
        fields = {PREFIX + "_".join(map(str, issue["loc"])).upper(): issue["msg"] for issue in error.errors()}
        raise BadInput("Settings cannot be used.", fields) from None
