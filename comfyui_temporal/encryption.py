"""Encryption of what Temporal holds (docs/encryption.md): a payload codec by AES-256-GCM with named keys.

A payload is encrypted whole. Its ciphertext is `nonce (12 bytes) + AES-GCM(payload)`, and the id of the key stands in
its metadata and is authenticated. A payload that is not encrypted is read as it is: histories from before the switch go
on.

The extra `encryption` installs what keys need. Without keys a payload of another process that encrypts is refused, and
never taken for bad input.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import SecretStr
from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.converter import DefaultFailureConverter, PayloadCodec

from comfyui_temporal.contracts.tasks import TaskInput, input_sha256_of
from comfyui_temporal.encryption_keys import EncryptionError, EncryptionKey, KeysUnusable, distinct_ids, parsed_keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ENCODING: Final = b"binary/encrypted"
KEY_ID: Final = "encryption-key-id"
NONCE_BYTES: Final = 12
_HASH_LABEL: Final = b"comfyui-temporal input_sha256"


class KeyMissing(EncryptionError):
    """A payload was encrypted with a key that this process does not have."""

    code = "encryption_key_missing"


class PayloadRejected(EncryptionError):
    """A payload was changed after it was encrypted, or the key under its key's id is another one."""

    code = "payload_rejected"


class PayloadEncryption(PayloadCodec):
    """Encrypts with the first key and decrypts with each. Without keys, or where encryption is off, it writes plainly.

    `encode` never fails; `decode` raises KeyMissing or PayloadRejected.
    """

    def __init__(self, keys: Sequence[EncryptionKey] = (), *, encrypts: bool = True) -> None:
        """`encrypts=False`: only read what others encrypt. Raises KeysUnusable."""
        self.key_ids: Final = distinct_ids(keys)
        self.encrypts: Final = encrypts and bool(keys)
        self._ciphers: Final = {key.key_id: _cipher(key.secret) for key in keys}
        self._hash_keys: Final = [hmac.digest(key.secret, _HASH_LABEL, "sha256") for key in keys]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a setting's text (comfyui_temporal/encryption_keys.py). Raises KeysUnusable."""
        keys, encrypts = parsed_keys(text)
        return cls(keys, encrypts=encrypts)

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [self._encrypted(payload) for payload in payloads] if self.encrypts else list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Raises KeyMissing, PayloadRejected."""
        return [
            self._decrypted(payload) if payload.metadata.get("encoding") == ENCODING else payload
            for payload in payloads
        ]

    def _encrypted(self, payload: Payload) -> Payload:
        key_id, nonce = self.key_ids[0], os.urandom(NONCE_BYTES)
        sealed = self._ciphers[key_id].encrypt(nonce, payload.SerializeToString(), key_id.encode())
        return Payload(metadata={"encoding": ENCODING, KEY_ID: key_id.encode()}, data=nonce + sealed)

    def _decrypted(self, payload: Payload) -> Payload:
        key_id = payload.metadata.get(KEY_ID, b"").decode(errors="replace")[:64]
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise KeyMissing(
                f"A payload is encrypted with the key {key_id!r}, which this process does not have: add it to the "
                "encryption keys here (docs/encryption.md)."
            )
        nonce, sealed = payload.data[:NONCE_BYTES], payload.data[NONCE_BYTES:]
        try:
            return Payload.FromString(cipher.decrypt(nonce, sealed, key_id.encode()))
        except Exception:
            raise PayloadRejected(
                f"A payload cannot be decrypted with the key {key_id!r}: it was changed, or another process has "
                "another key under this id (docs/encryption.md)."
            ) from None

    def sealed(self, content: bytes) -> bytes:
        """The content encrypted as a payload, for the task store. Only where this encrypts."""
        return self._encrypted(Payload(data=content)).SerializeToString()

    def opened(self, sealed: bytes) -> bytes:
        """What `sealed` encrypted. Raises KeyMissing, PayloadRejected."""
        return self._decrypted(Payload.FromString(sealed)).data

    def input_hash(self, task: TaskInput) -> str:
        """`input_sha256` as it is stored: keyed while this encrypts, so that no prompt can be guessed from it."""
        return self.keyed_hash(input_sha256_of(task))

    def keyed_hash(self, sha256: str) -> str:
        """The hash that is stored for an input with this plain hash, in hex."""
        return _keyed(self._hash_keys[0], sha256) if self.encrypts else sha256

    def is_hash_of(self, stored: object, task: TaskInput) -> bool:
        """Whether a stored hash is this input's, whether it was stored plainly or with any of the keys."""
        plain = input_sha256_of(task)
        return stored in (plain, *(_keyed(key, plain) for key in self._hash_keys))


NO_ENCRYPTION: Final = PayloadEncryption()


def encryption_of(client: Client) -> PayloadEncryption:
    """What a client encrypts with; `NO_ENCRYPTION` if its codec is not ours."""
    codec = client.data_converter.payload_codec
    return codec if isinstance(codec, PayloadEncryption) else NO_ENCRYPTION


class EncryptedFailures(DefaultFailureConverter):
    """Messages and stack traces of failures are encrypted too, but for our own errors: operators must read those."""

    def __init__(self) -> None:
        super().__init__(encode_common_attributes=True)

    def to_failure(self, exception: BaseException, payload_converter: Any, failure: Any) -> None:
        super().to_failure(exception, payload_converter, failure)
        if isinstance(exception, EncryptionError):
            failure.ClearField("encoded_attributes")
            failure.message = str(exception)


def encryption_by(keys: SecretStr | None) -> PayloadEncryption:
    """The encryption of a setting. Raises KeysUnusable."""
    return NO_ENCRYPTION if keys is None else PayloadEncryption.parse(keys.get_secret_value())


def _keyed(key: bytes, sha256: str) -> str:
    return hmac.new(key, sha256.encode(), hashlib.sha256).hexdigest()


def _cipher(secret: bytes) -> AESGCM:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise KeysUnusable("Encryption needs its extra: pip install 'comfyui-temporal[encryption]'.") from None
    return AESGCM(secret)
