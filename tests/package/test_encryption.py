"""The payload codec: what it writes, what it reads, and what it refuses with which sentence."""

from __future__ import annotations

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload

from comfyui_temporal.command_line.failures import BadInput
from comfyui_temporal.command_line.settings import CommandSettings
from comfyui_temporal.command_line.settings import read_settings as command_settings
from comfyui_temporal.contracts.size_budget import ENCRYPTION_BYTES, MAX_START_BYTES, SERVER_PAYLOAD_BYTES
from comfyui_temporal.contracts.tasks import ImageTask, input_sha256_of
from comfyui_temporal.encryption import KeyMissing, PayloadEncryption, PayloadRejected
from comfyui_temporal.encryption_keys import EncryptionKey, KeysUnusable
from runtime.required_settings import CannotStart, read_settings

OLD, NEW = EncryptionKey("2030", b"o" * 32), EncryptionKey("2031", b"n" * 32)
PAYLOAD = Payload(metadata={"encoding": b"json/plain"}, data=b'{"prompt": "a lighthouse"}')
TASK = ImageTask(task_id="t-1", tenant_id="t", user_id="u", template_id="x", prompt="a lighthouse")


def text_of(key: EncryptionKey) -> str:
    return f"{key.key_id}:{base64.b64encode(key.secret).decode()}"


@given(data=st.binary(max_size=10_000), metadata=st.dictionaries(st.text(max_size=20), st.binary(max_size=50)))
async def test_what_is_decrypted_is_what_was_encrypted(data: bytes, metadata: dict[str, bytes]) -> None:
    payload = Payload(metadata=metadata, data=data)
    [encrypted] = await PayloadEncryption([OLD]).encode([payload])
    assert encrypted.metadata["encoding"] == b"binary/encrypted"
    assert len(data) < 8 or data not in encrypted.data
    assert await PayloadEncryption([NEW, OLD]).decode([encrypted]) == [payload]


async def test_the_same_payload_is_never_encrypted_alike() -> None:
    first, second = await PayloadEncryption([OLD]).encode([PAYLOAD, PAYLOAD])
    assert first.data != second.data


async def test_the_first_key_encrypts_and_plain_encrypts_nothing() -> None:
    [rotated] = await PayloadEncryption.parse(f"{text_of(NEW)}, {text_of(OLD)}").encode([PAYLOAD])
    assert rotated.metadata["encryption-key-id"] == b"2031"
    reading = PayloadEncryption.parse(f"plain,{text_of(NEW)}")
    assert await reading.encode([PAYLOAD]) == [PAYLOAD]
    assert await reading.decode([rotated, PAYLOAD]) == [PAYLOAD, PAYLOAD]
    assert await PayloadEncryption.parse("").encode([PAYLOAD]) == [PAYLOAD]


async def test_a_payload_of_another_key_is_refused_by_its_id() -> None:
    [encrypted] = await PayloadEncryption([OLD]).encode([PAYLOAD])
    for without in (PayloadEncryption(), PayloadEncryption([NEW])):
        with pytest.raises(KeyMissing, match=r"key '2030', which this process does not have"):
            await without.decode([encrypted])
    with pytest.raises(PayloadRejected, match="key '2030'"):
        await PayloadEncryption([EncryptionKey("2030", b"x" * 32)]).decode([encrypted])


async def test_a_changed_payload_is_refused_wherever_it_was_changed() -> None:
    encryption = PayloadEncryption([OLD, EncryptionKey("2029", OLD.secret)])
    [encrypted] = await encryption.encode([PAYLOAD])
    for place in range(len(encrypted.data)):
        changed = bytearray(encrypted.data)
        changed[place] ^= 1
        with pytest.raises(PayloadRejected):
            await encryption.decode([Payload(metadata=encrypted.metadata, data=bytes(changed))])
    for length in (0, 5, 12, len(encrypted.data) - 1):
        with pytest.raises(PayloadRejected):
            await encryption.decode([Payload(metadata=encrypted.metadata, data=encrypted.data[:length])])
    renamed = Payload(metadata={**encrypted.metadata, "encryption-key-id": b"2029"}, data=encrypted.data)
    with pytest.raises(PayloadRejected):
        await encryption.decode([renamed])
    with pytest.raises(KeyMissing):
        await encryption.decode([Payload(metadata={"encoding": b"binary/encrypted"}, data=encrypted.data)])


async def test_encryption_fits_its_budget() -> None:
    longest = PayloadEncryption([EncryptionKey("k" * 64, b"k" * 32)])
    largest = Payload(metadata=PAYLOAD.metadata, data=b"x" * MAX_START_BYTES)
    [encrypted] = await longest.encode([largest])
    assert encrypted.ByteSize() - len(largest.data) <= ENCRYPTION_BYTES
    assert encrypted.ByteSize() <= SERVER_PAYLOAD_BYTES


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmU=", "id:base64"),
        ("k1:not base64!", "'k1' is not base64"),
        ("k1:c2VjcmV0", "'k1' has 6 bytes"),
        ("k1:c2VjcmV0\u00e9", "'k1' is not base64"),
        ("c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U=:k1", "1 to 64 letters"),
        (f"{text_of(OLD)},{text_of(OLD)}", "same id"),
        (f"{text_of(OLD)},plain", "id:base64"),
        (f"a key:{'c2VjcmV0' * 4}", "1 to 64 letters"),
        (f"{'k' * 65}:{'c2VjcmV0' * 4}", "1 to 64 letters"),
        (f"plain:{'c2VjcmV0' * 4}", "not 'plain'"),
    ],
)
def test_a_wrong_key_is_named_and_not_shown(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeysUnusable, match=says):
        PayloadEncryption.parse(text)
    monkeypatch.setenv("COMFYUI_TEMPORAL_ENCRYPTION_KEYS", text)
    for read, refused in ((read_settings, CannotStart), (lambda: command_settings(CommandSettings), BadInput)):
        with pytest.raises(refused) as refusal:
            read()
        said = f"{refusal.value} {getattr(refusal.value, 'fields', '')}"
        assert re.search(says, said) and "encryption_keys" in said.lower()
        assert "c2VjcmV0" not in said, "no part of a key is shown"
    assert OLD.secret.decode() not in repr(OLD)


FIRST_VERSIONS = (
    "Op7LHRxHoyp417tl6ut2k+qpgnpqRG+YdLrFcaPkSmi2BDiGa654WOk3DGXISvPTixHVed/BioZ0JcYabJqso81ZWuuUV1xL9ebQ7DQuYb8="
)


async def test_what_the_first_version_encrypted_and_hashed_is_still_read() -> None:
    metadata = {"encoding": b"binary/encrypted", "encryption-key-id": b"2030"}
    recorded = Payload(metadata=metadata, data=base64.b64decode(FIRST_VERSIONS))
    assert await PayloadEncryption([NEW, OLD]).decode([recorded]) == [PAYLOAD]
    hashed = "999cb0495fb44eab39c8e480209e372d8d933713d0a0eb4c8ee9bf8f63995bb7"
    assert PayloadEncryption([NEW, OLD]).is_hash_of(hashed, TASK)


def test_the_hash_of_an_input_is_keyed_and_recognised_under_each_key() -> None:
    plain = input_sha256_of(TASK)
    of_old, of_new = PayloadEncryption([OLD]).input_hash(TASK), PayloadEncryption([NEW]).input_hash(TASK)
    assert len({plain, of_old, of_new}) == 3 and len(of_old) == 64
    assert PayloadEncryption().input_hash(TASK) == PayloadEncryption([OLD], encrypts=False).input_hash(TASK) == plain
    assert all(PayloadEncryption([NEW, OLD]).is_hash_of(stored, TASK) for stored in (plain, of_old, of_new))
    assert not PayloadEncryption([NEW]).is_hash_of(of_old, TASK)
    other = TASK.model_copy(update={"prompt": "a harbour"})
    assert not any(PayloadEncryption([NEW, OLD]).is_hash_of(stored, other) for stored in (plain, of_old, of_new, None))
