"""Encryption keys as settings name them; `comfyui_temporal.encryption` encrypts with them.

A setting is `id:base64,id:base64,…`. The first key encrypts, all of them decrypt. After a leading `plain` nothing is
encrypted, and the keys only decrypt.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final, Self

from pydantic import AfterValidator, SecretStr

KEY_BYTES: Final = 32
PLAIN: Final = "plain"
_KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")


class EncryptionError(Exception):
    """Something cannot be encrypted or decrypted here. The text is a sentence for operators; it holds no key."""

    code: ClassVar[str]


class KeysUnusable(EncryptionError, ValueError):
    """The given keys are not keys."""

    code = "encryption_keys_unusable"


@dataclass(frozen=True)
class EncryptionKey:
    """An AES-256 key: an id of 1 to 64 letters, digits, `.`, `_` or `-`, and 32 bytes. Raises KeysUnusable."""

    key_id: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_id(self.key_id)
        if len(self.secret) != KEY_BYTES:
            raise KeysUnusable(
                f"Encryption key {self.key_id!r} has {len(self.secret)} bytes; it must be {KEY_BYTES} random bytes."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """A key as `id:base64`. Raises KeysUnusable."""
        key_id, colon, encoded = text.partition(":")
        if not colon:
            raise KeysUnusable("An encryption key must be written as id:base64, for example k1:… with 32 random bytes.")
        _check_id(key_id)
        try:
            secret = base64.b64decode(encoded, validate=True)
        except ValueError:
            raise KeysUnusable(f"Encryption key {key_id!r} is not base64.") from None
        return cls(key_id, secret)


def _check_id(key_id: str) -> None:
    """A bad id is not shown: it may be a key in the wrong place."""
    if not _KEY_ID.fullmatch(key_id) or key_id == PLAIN:
        raise KeysUnusable(
            "The id of an encryption key must be 1 to 64 letters, digits, '.', '_' or '-', and not 'plain'."
        )


def distinct_ids(keys: Sequence[EncryptionKey]) -> tuple[str, ...]:
    """The keys' ids. Raises KeysUnusable if two are the same."""
    key_ids = tuple(key.key_id for key in keys)
    if len(set(key_ids)) < len(key_ids):
        raise KeysUnusable("Two encryption keys have the same id.")
    return key_ids


def parsed_keys(text: str) -> tuple[list[EncryptionKey], bool]:
    """The keys of a setting, and whether the first one encrypts. Raises KeysUnusable."""
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    encrypts = entries[:1] != [PLAIN]
    keys = [EncryptionKey.parse(entry) for entry in entries[not encrypts :]]
    distinct_ids(keys)
    return keys, encrypts


def _usable(keys: SecretStr) -> SecretStr:
    parsed_keys(keys.get_secret_value())
    return keys


EncryptionKeys = Annotated[SecretStr, AfterValidator(_usable)]
"""A setting's type."""
