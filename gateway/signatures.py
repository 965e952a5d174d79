"""Standard Webhooks (contract §2): verifies callbacks, and recognises repeated messages."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from standardwebhooks import Webhook

from runtime.callback_secrets import by_name

REMEMBERED_SECONDS: Final = 600.0
MAX_REMEMBERED: Final = 100_000
"""Beyond this the oldest ids are forgotten early. A replay of those is coalesced like any repeat."""
MAX_ID_LENGTH: Final = 256


class CallbackSignatures:
    """Verifies callbacks with every configured secret: one for each ComfyUI server, two of it during a rotation."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """`secrets` are `whsec_…` or `name:whsec_…`.

        Raises ValueError if there is none or one is malformed, without quoting it.
        """
        if not secrets:
            raise ValueError(
                "No callback secret is set: set COMFYUI_TEMPORAL_CALLBACK_SECRETS (whsec_…), or callbacks cannot be "
                "verified."
            )
        self._webhooks = {name: self._webhook(name, secret) for name, secret in by_name(secrets).items()}

    @staticmethod
    def _webhook(name: str, secret: str) -> Webhook:
        try:
            return Webhook(secret)
        except Exception:
            raise ValueError(f"Callback secret {name} is not `whsec_` and base64 (Standard Webhooks).") from None

    def signer_of(self, raw: bytes, headers: Mapping[str, str]) -> str | None:
        """The name of the secret that `raw` was signed with within ±300 s of now; None if it was none of them."""
        if len(headers.get("webhook-id", "")) > MAX_ID_LENGTH:
            return None
        return next(
            (name for name, webhook in self._webhooks.items() if self._signed_with(webhook, raw, headers)), None
        )

    @staticmethod
    def _signed_with(webhook: Webhook, raw: bytes, headers: Mapping[str, str]) -> bool:
        try:
            webhook.verify(raw, dict(headers), json_parse=False)
        except Exception:
            # Malformed signatures raise ValueError, binascii and Unicode errors too (pitfall 25).
            return False
        return True


class SeenCallbacks:
    """The webhook ids that were taken in the last 10 minutes. An id counts within its task."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._expires_at: OrderedDict[tuple[str, str], float] = OrderedDict()

    def knows(self, task_id: str, webhook_id: str) -> bool:
        self._forget_expired()
        return (task_id, webhook_id) in self._expires_at

    def remember(self, task_id: str, webhook_id: str) -> None:
        """Call it only once the callback's effect is safe: a sender without an answer must be able to repeat."""
        self._expires_at[task_id, webhook_id] = self._clock() + REMEMBERED_SECONDS
        self._expires_at.move_to_end((task_id, webhook_id))
        self._forget_expired()

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._expires_at:
            oldest = next(iter(self._expires_at))
            if self._expires_at[oldest] > now and len(self._expires_at) <= MAX_REMEMBERED:
                return
            del self._expires_at[oldest]
