"""What `python -m gateway` says when it cannot start."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.__main__ import main, serve
from runtime.required_settings import CannotStart
from runtime.settings import Settings

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"callback_secrets": [SECRET]}, "COMFYUI_TEMPORAL_DATABASE_DSN"),
        ({"callback_secrets": [SECRET], "database_dsn": "nonsense"}, "postgresql://user"),
        ({"callback_secrets": [SECRET], "database_dsn": "postgresql://u:p@h:port/d"}, "postgresql://user"),
        ({"callback_secrets": [SECRET], "database_dsn": "mysql://u:p@h/d"}, "postgresql://user"),
        ({"database_dsn": "postgresql://u:p@h/d"}, "No callback secret is set"),
        ({"callback_secrets": [SECRET, "whsec_é"], "database_dsn": "postgresql://u:p@h/d"}, "Callback secret 2"),
        ({"callback_secrets": [SECRET], "database_dsn": "postgresql://u:p@h/d", "caller_secret": None}, "JWKS_URL"),
        ({"callback_secrets": ["whsec_"], "database_dsn": "postgresql://u:p@h/d"}, "Callback secret 1"),
    ],
)
async def test_a_missing_or_wrong_setting_is_named_before_anything_is_served(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(CannotStart, match=sentence):
        await serve(Settings(**{"_env_file": None, "caller_secret": "t" * 32, **settings}))


def test_the_process_ends_with_2_and_a_sentence_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMFYUI_TEMPORAL_CALLBACK_SECRETS", f"{SECRET}x,secret-word")
    monkeypatch.setenv("COMFYUI_TEMPORAL_GATEWAY_PORT", "a")

    assert main() == 2

    printed = capsys.readouterr().err
    assert "gateway_port" in printed
    assert "secret-word" not in printed
