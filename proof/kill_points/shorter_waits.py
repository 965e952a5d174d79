"""Waits of minutes, made shorter for the rounds, in the gated worker and where its histories are replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final
from unittest.mock import patch

from workflows import ledger_search

LEDGER_LOOKED_AT_FOR: Final = timedelta(seconds=20)
"""Instead of ten minutes: what the ledger does not show by then counts as absent. Here it never lags."""


@contextmanager
def shorter_waits() -> Iterator[None]:
    with patch.object(ledger_search, "LOOK_FOR", LEDGER_LOOKED_AT_FOR):
        yield
