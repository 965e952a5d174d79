"""The settings of our services. Read by entry points only (`worker.py`, gateway, bridge, doctor, simulators, local
stack); the command line has its own few (comfyui_temporal/command_line/settings.py).

Each is an environment variable `COMFYUI_TEMPORAL_<NAME>`; a `.env` file in the working directory is read too.
The address of Temporal comes from Temporal's own environment configuration (`TEMPORAL_ADDRESS`, `TEMPORAL_PROFILE`,
TLS and API key; https://docs.temporal.io/develop/environment-configuration). The three `temporal_*` settings here
override it if they are set.
"""

from __future__ import annotations

import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import unquote

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from comfyui_temporal.contracts.fields import CallerId
from comfyui_temporal.contracts.permissions import Scene, Scope
from comfyui_temporal.contracts.policy import (
    CONFIRM_WITHIN_SECONDS,
    CONTINUE_AS_NEW_EVENTS,
    CONTINUE_AS_NEW_SIGNALS,
    RETRY_AFTER_SECONDS,
    Policy,
)
from comfyui_temporal.contracts.prices import PriceTable
from comfyui_temporal.contracts.scenes import SCENES
from comfyui_temporal.contracts.size_budget import MAX_ATTEMPTS, MAX_TABLE_ENTRIES
from comfyui_temporal.contracts.tasks import TASK_QUEUE
from comfyui_temporal.contracts.tenant_limits import MAX_LIMIT, TenantLimits
from comfyui_temporal.encryption_keys import EncryptionKeys
from runtime.callback_secrets import by_name
from runtime.caller_claims import CallerClaims
from runtime.storage_apart import check_apart

MIN_SECRET_BYTES = 32
TEMPORALS_OWN_KEY: Final = "TEMPORAL_API_KEY"
"""Read by Temporal's environment configuration, not by these settings."""
_IMAGE: Final = SCENES[Scene.IMAGE_GENERATE]
_TRAINING: Final = SCENES[Scene.MODEL_TRAIN]
_KEYS: Final = (
    *("caller_secret", "service_secret", "stream_token_secret", "bridge_result_secret"),
    *("simulator_admin_token", "codec_server_token"),
)
_DEPLOYMENT_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,127}$"
"""Temporal writes a version as `name.build` or `name:build`: neither sign may be in the name."""
_BUILD_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$"
_PASSWORD: Final = re.compile(r"://[^/]*?:(.+)@")


_LimitName = Literal[
    "starts_per_minute", "bytes_per_minute", "open_tasks", "open_streams", "open_uploads", "upload_bytes"
]


def _without_slash(url: str) -> str:
    return url.rstrip("/")


ServiceUrl = Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_without_slash)]


class Settings(BaseSettings):
    """Settings of one process. Secrets are `SecretStr`: printing the settings shows none."""

    model_config = SettingsConfigDict(
        env_prefix="COMFYUI_TEMPORAL_", env_file=".env", extra="ignore", hide_input_in_errors=True
    )

    # Temporal
    temporal_address: str | None = None
    """`host:port`; default: Temporal's environment configuration, else localhost:7233."""
    temporal_namespace: str | None = None
    temporal_profile: str | None = None
    task_queue: str = TASK_QUEUE
    encryption_keys: EncryptionKeys | None = None
    """AES-256 keys for what Temporal holds, `id:base64`, comma-separated; see docs/encryption.md."""

    # The outside parties
    comfyui_url: ServiceUrl = "http://127.0.0.1:8188"
    """Where contract §2's `/comfyui/v1` is served: a platform's ComfyUI service, the bridge or the simulator."""
    credits_url: ServiceUrl = "http://127.0.0.1:8190"
    service_secret: SecretStr | None = None
    """HS256 secret (at least 32 bytes) of the tokens that we make for each call to these two (contract §7). They know
    it, the bridge and the simulators too; callers never do."""
    service_issuer: str = "comfyui-temporal"
    service_audience: str = "comfyui-services"
    service_token: SecretStr | None = None
    """A static bearer token, used instead of tokens for each call if a service accepts only that."""

    # Callbacks
    callback_base_url: ServiceUrl = "http://127.0.0.1:8180"
    """The address under which ComfyUI reaches our gateway."""
    callback_secrets: Annotated[list[SecretStr], NoDecode] = []
    """Standard Webhooks secrets, `whsec_…` or `name:whsec_…`, comma-separated. A gateway takes callbacks signed with
    any of them; a bridge or GPU worker signs with the first."""

    # Doors: gateway, bridge, codec server
    connections_per_address: int = Field(default=1_000, ge=0)
    """How many connections one address may have open at one port of ours; 0: any number. Of IPv6 a network of 64 bits
    counts as one address."""
    trusted_proxies: Annotated[list[str], NoDecode] = ["127.0.0.1", "::1"]
    """Addresses and networks of your own proxies, comma-separated: their `X-Forwarded-…` headers are believed, and they
    may open any number of connections."""

    # Gateway
    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=8180, ge=0, le=65_535)
    gateway_operations_port: int | None = Field(default=None, ge=1, le=65_535)
    """Serves `/metrics` and `/openapi.json`, with health, instead of `gateway_port`; none by default."""
    gateway_public_url: ServiceUrl | None = None
    """The address under which clients reach the gateway, for `stream/config`; default: the address of their request."""
    temporal_ui_url: ServiceUrl | None = None
    """The Temporal UI's address, for links on the live page."""
    jwks_url: ServiceUrl | None = None
    """Public keys of the callers' tokens; default: tokens are HS256 with `caller_secret`."""
    caller_secret: SecretStr | None = None
    """HS256 secret (at least 32 bytes) of the callers' tokens. Only the gateway needs it."""
    caller_issuer: str = "comfyui-temporal"
    """Empty: callers' tokens need no `iss`, and any is taken."""
    caller_audience: str = "comfyui-platform"
    """Empty: callers' tokens need no `aud`, and any is taken."""
    caller_tenant_claim: str = "tenant_id"
    """The claim that names the tenant; `a.b` is the claim `b` in the object `a`. A token without it is refused."""
    caller_user_claim: str = "user_id"
    caller_scopes_claim: str = "scopes"
    """A list, or a text with blanks in between, as OAuth's `scope`."""
    caller_default_user: CallerId | None = None
    """The user of tokens that name none; default: such a token is refused."""
    caller_scope_meanings: dict[str, list[Scope]] = {}
    """What wider scopes of the platform mean here, as JSON: `{"task.manage": ["task.read", "task.cancel"]}`."""
    ended_streams: Literal["close", "keep"] = "close"
    """A stream of tasks that have all ended: `close` answers 204; `keep` answers 200 with heartbeats until its client
    leaves, for clients that count a stream that does not open as a failure."""
    status_words: dict[
        Literal["completed", "failed", "cancelled"], Annotated[str, Field(pattern=r"^[a-z_]{1,32}$")]
    ] = {}
    """Other words for ends in events, as JSON, for clients that know others: `{"completed": "success"}`."""
    caller_token_max_seconds: int | None = Field(default=None, ge=60)
    """The longest time from `iat` to `exp` of a caller's token; then `iat` is demanded. Default: any."""
    stream_token_secret: SecretStr | None = None
    """Secret (at least 32 bytes) of the gateway's own stream tokens, the same in all its processes; default: derived
    from `caller_secret`, else a new one at each start."""
    tenant_starts_per_minute: int = Field(default=6_000, ge=0, le=MAX_LIMIT)
    """Limits of each tenant; 0: none. Gateways refuse beyond them, and workers what was started past the gateways."""
    tenant_bytes_per_minute: int = Field(default=268_435_456, ge=0, le=MAX_LIMIT)
    """Of the bodies of starts."""
    tenant_open_tasks: int = Field(default=50_000, ge=0, le=MAX_LIMIT)
    tenant_open_streams: int = Field(default=5_000, ge=0, le=MAX_LIMIT)
    tenant_open_uploads: int = Field(default=100, ge=0, le=MAX_LIMIT)
    """Of uploads that are not whole yet."""
    tenant_upload_bytes: int = Field(default=20 * 1024**3, ge=0, le=MAX_LIMIT)
    """Of all uploads that are kept, each with the size that it will have."""
    tenant_limits: dict[str, dict[_LimitName, Annotated[int, Field(ge=0, le=MAX_LIMIT)]]] = {}
    """Other limits of single tenants, as JSON: `{"tenant-a": {"starts_per_minute": 60}}`."""
    own_tasks_only: bool = False
    """Users of one tenant do not see each other's tasks; default: they do."""
    allowed_origins: Annotated[list[str], NoDecode] = []
    """Origins whose pages may call the gateway from a browser, with credentials; comma-separated, e.g.
    `https://app.example`."""

    # Storage
    database_dsn: SecretStr | None = None
    """`postgresql://user:password@host:port/database`."""
    retention_days: int = Field(default=90, ge=30)
    """How long a task's row, events and log are kept after its end. At least 30 days, as long as idempotency keys live.
    The claim of its id is never deleted."""
    keep_inputs: bool = True
    """Whether a task's prompt and parameters are stored with its row, to be shown and searched; encrypted, and then not
    searched, where `ENCRYPTION_KEYS` encrypt. False: they are in Temporal alone."""
    result_retention_days: int | None = Field(default=None, ge=1)
    """How long the bridge's results are kept; default: with their task's row, `retention_days`."""
    model_retention_days: int | None = Field(default=None, ge=30)
    """How long the bridge's models and checkpoints are kept; default: until their tenant is forgotten. At least 30
    days, as long as a training may run: it resumes from its checkpoints."""
    audit_retention_days: int = Field(default=365, ge=30)
    """How long the audit log is kept, at least 30 days."""
    object_store_url: str = "file://.run/objects"
    """Temporary object storage for dataset snapshots: `file://`, `s3://`, `gs://`, `az://`."""
    uploads_url: str | None = None
    """Object storage for callers' uploads: `file://`, `s3://`, `gs://`, `az://`. Gateways and bridge must share it.
    Without it nothing can be uploaded."""
    upload_max_bytes: int = Field(default=512 * 1024**2, ge=1, le=2**40)
    """The largest upload, in parts. The bridge takes no larger video or sound from elsewhere either."""
    upload_whole_bytes: int = Field(default=20 * 1024**2, ge=1, le=1024**3)
    """The largest upload that is sent at once."""
    upload_inline_bytes: int = Field(default=256 * 1024, ge=0, le=8 * 1024**2)
    """The most bytes of files within one order, in base64, all together; 0: none is taken."""
    upload_hours: float = Field(default=24, gt=0, le=24 * 365)
    """How long an upload may be named. It is deleted with the first purge a day later, unless an open task may
    name it."""
    dataset_roots: Annotated[list[str], NoDecode] = []
    """Prefixes for a tenant's datasets and checkpoints, comma-separated; each must contain `{tenant_id}`.
    Without any, no dataset is read: trainings are refused."""

    # Policy (contract §5, §8)
    prices: PriceTable = PriceTable()
    """JSON; see comfyui_temporal/contracts/prices.py for its fields."""
    image_poll_after_seconds: float = Field(default=_IMAGE.poll_after_seconds, gt=0)
    image_poll_at_most_seconds: float = Field(default=_IMAGE.poll_at_most_seconds, gt=0)
    training_poll_after_seconds: float = Field(default=_TRAINING.poll_after_seconds, gt=0)
    training_poll_at_most_seconds: float = Field(default=_TRAINING.poll_at_most_seconds, gt=0)
    deadline_factor: float = Field(default=3.0, gt=0)
    image_cap_minutes: float = Field(default=_IMAGE.cap_minutes, gt=0)
    training_cap_minutes: float = Field(default=_TRAINING.cap_minutes, gt=0)
    confirm_within_seconds: float = Field(default=CONFIRM_WITHIN_SECONDS, gt=0)
    retry_after_seconds: Annotated[list[float], NoDecode] = list(RETRY_AFTER_SECONDS)
    charge_shortfall: bool = False
    queue_sla_accelerated_minutes: float = Field(default=3.0, gt=0)
    queue_sla_standard_minutes: float = Field(default=8.0, gt=0)
    short_way: bool = True
    """Whether the gateway stores ticks itself, and the workflow looks for them there (decision 4). Off: each callback
    is a signal."""
    continue_as_new_events: int = Field(default=CONTINUE_AS_NEW_EVENTS, ge=50)
    continue_as_new_signals: int = Field(default=CONTINUE_AS_NEW_SIGNALS, ge=10)

    # Reconciler
    reconcile_every_seconds: float = Field(default=300, ge=1)
    """How often the reconciler looks for tasks whose run has ended while their row is open."""
    reconcile_pause_seconds: float = Field(default=60, ge=0, le=3_600)
    """How long such a row must be unchanged, and its run then be found closed, before it is given back."""

    # Worker
    max_cached_workflows: int = Field(default=1_000, ge=0)
    max_workflow_tasks: int = Field(default=20, ge=2)
    max_activities: int = Field(default=100, ge=1)
    max_local_activities: int = Field(default=50, ge=1)
    grace_seconds: float = Field(default=20, ge=0)
    """How long a stopping worker lets calls in flight end."""
    worker_host: str = "127.0.0.1"
    """Where the health and metrics pages of worker and GPU worker listen."""
    health_port: int | None = Field(default=None, ge=1, le=65_535)
    """`/healthz`, `/readyz` and `/startupz`; none by default."""
    metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """Prometheus metrics, `/metrics`; none by default."""
    deployment_name: Annotated[str, Field(pattern=_DEPLOYMENT_NAME)] | None = None
    """The Worker Deployment that workers belong to (docs/operations.md#rolling-out); none by default: workers are
    unversioned. The bridge and its GPU workers never read it."""
    build_id: Annotated[str, Field(pattern=_BUILD_ID)] | None = None
    """The build of this worker within its deployment. Each build that runs other workflow code needs its own."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_json: bool = True
    traces: bool = False
    """Send traces by OTLP over HTTP, of all our processes; where to is said by `OTEL_EXPORTER_OTLP_ENDPOINT`."""

    # Bridge: see docs/use-your-own-comfyui.md
    bridge_task_queue: str = "comfyui-bridge"
    """Queue of the bridge's own work. The queue names of its pools and servers begin with it."""
    bridge_host: str = "127.0.0.1"
    bridge_port: int = Field(default=8195, ge=0, le=65_535)
    bridge_url: ServiceUrl | None = None
    """The address under which results are fetched whose addresses the bridge signs; default: host and port."""
    bridge_result_addresses: Literal["store", "bridge"] = "store"
    """Who signs addresses of results: the store, where it can, or the bridge, which leads on to the store."""
    bridge_store_url: str = "file://.run/bridge"
    """Object storage for results, control images and checkpoints: `file://`, `s3://`, `gs://`, `az://`. Bridge and GPU
    workers must share it."""
    bridge_templates: Annotated[list[Path], NoDecode] = []
    """Folders of your own templates, comma-separated. One of them replaces a shipped one with the same id."""
    bridge_image_hosts: Annotated[list[str], NoDecode] = []
    """Hosts that control images may come from by https, comma-separated; `.example.org` for all below it."""
    bridge_image_roots: Annotated[list[str], NoDecode] = []
    """Prefixes of object storage for a tenant's control images, comma-separated; each must contain
    `{tenant_id}`."""
    bridge_lora_hosts: Annotated[list[str], NoDecode] = []
    """Hosts that images' LoRAs may come from by https, comma-separated; `.example.org` for all below it."""
    bridge_lora_cache_bytes: int = Field(default=8 * 1024**3, ge=1)
    """How much of tenants' trained models a ComfyUI server keeps for later images; what was used least recently goes
    first. The models of one image must fit into it."""
    bridge_warm_up: Annotated[list[str], NoDecode] = []
    """Templates of images, comma-separated, that each GPU worker runs once when its server comes up or comes back,
    while no job waits: their models are then loaded before the first job."""
    bridge_callback_urls: Annotated[list[str], NoDecode] = []
    """Gateways to send callbacks to, as `callback_base_url`, comma-separated; default: that one alone."""
    bridge_result_secret: SecretStr | None = None
    """Secret (at least 32 bytes) that signs addresses of results, the same in all bridge processes; default: derived
    from `service_secret`."""
    gpu_health_port: int | None = Field(default=None, ge=1, le=65_535)
    """A GPU worker's `/healthz` and `/readyz`, at `worker_host`; none by default."""
    bridge_metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """The bridge's Prometheus metrics, `/metrics`, at `bridge_host`; none by default."""
    gpu_metrics_port: int | None = Field(default=None, ge=1, le=65_535)
    """A GPU worker's Prometheus metrics, `/metrics`, at `worker_host`; none by default."""
    gpu_server_token: SecretStr | None = None
    """Bearer token that a proxy before a GPU worker's ComfyUI server demands."""
    gpu_server_login: SecretStr | None = None
    """`user:password` for a proxy with basic authentication."""
    gpu_server_headers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+$")], SecretStr] = {}
    """Other headers that such a proxy demands, a JSON object of names and values."""
    gpu_grace_seconds: float = Field(default=600, ge=0)
    """How long a stopping GPU worker lets its graph run to the end before it returns the job."""

    # Codec server: see docs/encryption.md
    codec_server_host: str = "127.0.0.1"
    codec_server_port: int = Field(default=8196, ge=0, le=65_535)
    codec_server_token: SecretStr | None = None
    """The token that it demands, at least 32 bytes."""
    codec_server_origins: Annotated[list[str], NoDecode] = []
    """Origins of the Temporal UI that may use it from a browser, with credentials; comma-separated."""

    # Simulators
    simulator_host: str = "127.0.0.1"
    comfyui_simulator_port: int = Field(default=8188, ge=0, le=65_535)
    credits_simulator_port: int = Field(default=8190, ge=0, le=65_535)
    simulator_public_url: ServiceUrl | None = None
    """The address under which results are fetched; default: the address of the job's request."""
    simulator_folder: Path = Path(".run/simulators")
    simulator_speed: float = Field(default=1.0, gt=0)
    """How many contract seconds pass in one real second."""
    simulator_credits_profile: Literal["contract", "field"] = "contract"
    """Which credits service is simulated: one that follows our contract, or the platform's own as observed (field)."""
    simulator_admin_token: SecretStr | None = None

    @field_validator(
        *("callback_secrets", "dataset_roots", "retry_after_seconds", "allowed_origins", "codec_server_origins"),
        *("bridge_templates", "bridge_image_hosts", "bridge_image_roots", "bridge_callback_urls", "trusted_proxies"),
        *("bridge_warm_up", "bridge_lora_hosts"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator(*_KEYS)
    @classmethod
    def _long_enough(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"must be at least {MIN_SECRET_BYTES} bytes long")
        return secret

    @model_validator(mode="after")
    def _no_key_twice(self) -> Self:
        names: dict[SecretStr, str] = {}
        for name in _KEYS:
            if (key := getattr(self, name)) is not None and names.setdefault(key, name) != name:
                raise ValueError(f"{names[key]} and {name} must differ, or one token would open the other's doors")
        if self.caller_audience == self.service_audience:
            raise ValueError("caller_audience and service_audience must differ")
        return self

    @model_validator(mode="after")
    def _uploads_apart(self) -> Self:
        stores = {name: getattr(self, name) for name in ("bridge_store_url", "object_store_url")}
        roots = {name: getattr(self, name) for name in ("dataset_roots", "bridge_image_roots")}
        check_apart(self.uploads_url, stores, roots)
        return self

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        # A worker with half of a version would poll unversioned, and get nothing once a version is current.
        if (self.deployment_name is None) != (self.build_id is None):
            raise ValueError("deployment_name and build_id must be set together, or neither")
        return self

    @field_validator("prices")
    @classmethod
    def _small_enough_for_each_run(cls, prices: PriceTable) -> PriceTable:
        entries = len(prices.extras) + len(prices.base_models)
        if entries > MAX_TABLE_ENTRIES:
            raise ValueError(
                f"names {entries} extras and base models; each run holds them, at most {MAX_TABLE_ENTRIES}"
            )
        return prices

    @field_validator("retry_after_seconds")
    @classmethod
    def _few_attempts(cls, pauses: list[float]) -> list[float]:
        if len(pauses) >= MAX_ATTEMPTS:
            raise ValueError(f"names {len(pauses)} pauses; a task has at most {MAX_ATTEMPTS} attempts")
        return pauses

    @field_validator("allowed_origins", "codec_server_origins")
    @classmethod
    def _named_one_by_one(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise ValueError(f"{origin!r} must look like https://app.example, without a path; * is not allowed")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _addresses_or_networks(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"{proxy!r} is neither an address nor a network: {error}") from None
        return proxies

    @field_validator("dataset_roots", "bridge_image_roots")
    @classmethod
    def _per_tenant(cls, roots: list[str]) -> list[str]:
        for root in roots:
            if "{tenant_id}/" not in root or not root.endswith("/"):
                raise ValueError(f"{root!r} must contain '{{tenant_id}}/' and end with '/'")
        return roots

    @cached_property
    def caller_claims(self) -> CallerClaims:
        return CallerClaims(
            tenant=self.caller_tenant_claim,
            user=self.caller_user_claim,
            scopes=self.caller_scopes_claim,
            default_user=self.caller_default_user,
            meanings=self.caller_scope_meanings,
        )

    def limits_of(self, tenant_id: str) -> TenantLimits:
        """A tenant's limits: the settings', with what is set for this tenant alone."""
        own = self.tenant_limits.get(tenant_id, {})
        return self._limits.model_copy(update={str(name): most for name, most in own.items()})

    @cached_property
    def _limits(self) -> TenantLimits:
        return TenantLimits(
            starts_per_minute=self.tenant_starts_per_minute,
            bytes_per_minute=self.tenant_bytes_per_minute,
            open_tasks=self.tenant_open_tasks,
            open_streams=self.tenant_open_streams,
            open_uploads=self.tenant_open_uploads,
            upload_bytes=self.tenant_upload_bytes,
        )

    @property
    def hidden_values(self) -> list[str]:
        """Every secret, Temporal's API key too, for the logs to leave out; of the database's address its password."""
        values = [value for value in vars(self).values() if isinstance(value, SecretStr)]
        found = [secret.get_secret_value() for secret in (*values, *self.callback_secrets)]
        found += [secret.get_secret_value().rpartition(":")[2] for secret in self.callback_secrets]
        found += [secret.get_secret_value() for secret in self.gpu_server_headers.values()]
        found += [self.gpu_server_login.get_secret_value().partition(":")[2]] if self.gpu_server_login else []
        found += re.split("[:,]", self.encryption_keys.get_secret_value()) if self.encryption_keys else []
        found += [key for key in [os.environ.get(TEMPORALS_OWN_KEY)] if key]
        password = _PASSWORD.search(self.database_dsn.get_secret_value()) if self.database_dsn else None
        return [*found, *([password[1], unquote(password[1])] if password else [])]

    @property
    def signing_secret(self) -> str | None:
        """The secret, `whsec_…`, that this process signs callbacks with."""
        secrets = by_name([secret.get_secret_value() for secret in self.callback_secrets])
        return next(iter(secrets.values()), None)

    @cached_property
    def queue_sla_minutes(self) -> dict[str, float]:
        return {"accelerated": self.queue_sla_accelerated_minutes, "standard": self.queue_sla_standard_minutes}

    def _of_scene(self, scene: Scene, name: str) -> float:
        """The setting `{noun}_{name}`, else the value in the table of scenes."""
        spec = SCENES[scene]
        value: float = getattr(self, f"{spec.noun}_{name}", getattr(spec, name))
        return value

    def policy(self, *, scene: Scene, task_id: str, tenant_id: str, priority: str) -> Policy:
        """The policy of one task (contract §5 (ours): prices and limits are not part of the input)."""
        return Policy(
            prices=self.prices,
            callback_url=f"{self.callback_base_url}/callbacks/comfyui/{task_id}",
            poll_after_seconds=self._of_scene(scene, "poll_after_seconds"),
            poll_at_most_seconds=self._of_scene(scene, "poll_at_most_seconds"),
            deadline_factor=self.deadline_factor,
            cap_minutes=self._of_scene(scene, "cap_minutes"),
            confirm_within_seconds=self.confirm_within_seconds,
            retry_after_seconds=self.retry_after_seconds,
            charge_shortfall=self.charge_shortfall,
            queue_sla_minutes=self.queue_sla_minutes[priority],
            continue_as_new_events=self.continue_as_new_events,
            continue_as_new_signals=self.continue_as_new_signals,
            short_way=self.short_way,
            counts_from_processing=True,
            checks_balance_first=True,
            dataset_roots=[root.replace("{tenant_id}", tenant_id) for root in self.dataset_roots],
        )


SECRETS: Final = frozenset(
    name for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
)
"""The settings that no other process and no log may learn."""
