"""Sends callbacks (contract §2), signed as Standard Webhooks. Each attempt has its own timestamp."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import structlog
from standardwebhooks import Webhook
from standardwebhooks.webhooks import EmptyWebhookSecretError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from bridge.calls import SEND_CALLBACK
from bridge.orders import Callback
from runtime.http_transport import OwnsClient, PatientClient
from runtime.trace_context import with_trace

REPEATED_AFTER_SECONDS: Final = (1.0, 5.0, 30.0, 120.0, 600.0)
HOURLY_SECONDS: Final = 3600.0
NOT_REPEATED: Final = frozenset({401, 404, 413})
SEND_SECONDS: Final = 10.0
TICK_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)


class CallbackSender(OwnsClient):
    """Posts signed callbacks. Raises ValueError unless the secret is `whsec_` and base64."""

    _client: PatientClient

    def __init__(self, secret: str) -> None:
        try:
            self._webhook = Webhook(secret)
        except (ValueError, EmptyWebhookSecretError):
            raise ValueError("a callback secret must be a Standard Webhooks secret: whsec_ and base64") from None
        self._client = PatientClient(
            timeout=SEND_SECONDS,
            follow_redirects=False,
            headers={"user-agent": "comfyui-temporal"},
            mounts={"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None},
        )

    async def send(self, callback: Callback, *, seconds: float = SEND_SECONDS) -> int | None:
        """POST the callback. Returns the status of the answer, or None without an answer."""
        now = datetime.now(UTC)
        headers = {
            "content-type": "application/json",
            "webhook-id": callback.webhook_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._webhook.sign(callback.webhook_id, now, callback.body),
        }
        try:
            response = await self._client.post(
                callback.url, content=callback.body.encode(), headers=with_trace(headers), timeout=seconds
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            log.info("callback_unanswered", webhook_id=callback.webhook_id, reason=type(error).__name__)
            return None
        return response.status_code


def is_settled(status: int | None) -> bool:
    """Whether the callback must not be sent again: accepted, or refused for good."""
    return status is not None and (200 <= status < 300 or status in NOT_REPEATED)


def repeated_after(attempt: int) -> timedelta:
    """The delay after this attempt, counted from 1 (contract §2)."""
    later = REPEATED_AFTER_SECONDS[attempt - 1] if attempt <= len(REPEATED_AFTER_SECONDS) else HOURLY_SECONDS
    return timedelta(seconds=later)


class CallbackActivities:
    """The activity that workflows call. Temporal retries it on the contract's schedule."""

    def __init__(self, sender: CallbackSender) -> None:
        self._sender = sender

    @activity.defn(name=SEND_CALLBACK)
    async def send_callback(self, callback: Callback) -> int:
        """The status of the final answer. Raises ApplicationError, retried on the contract's schedule."""
        status = await self._sender.send(callback)
        if status is not None and is_settled(status):
            if status >= 300:
                log.warning("callback_refused", webhook_id=callback.webhook_id, status=status)
            return status
        reason = "no answer" if status is None else f"HTTP {status}"
        raise ApplicationError(
            f"The task's callback address gave {reason}.",
            type="callback_unanswered",
            next_retry_delay=repeated_after(activity.info().attempt),
        )
