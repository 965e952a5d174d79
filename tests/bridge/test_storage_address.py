"""The address of the bridge's object storage."""

from __future__ import annotations

import pytest

from bridge.storage import Storage


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("s3://results?versions=1", id="a query"),
        pytest.param("s3://results?", id="an empty query"),
        pytest.param("s3://results/#newest", id="a fragment"),
        pytest.param("s3://results/#", id="an empty fragment"),
        pytest.param("s3://key:secret@results", id="credentials"),
        pytest.param("https://results.example/", id="another scheme"),
    ],
)
def test_an_address_that_no_path_can_follow_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"BRIDGE_STORE_URL must be a file://, s3://") as raised:
        Storage(url)
    assert "secret" not in str(raised.value)
