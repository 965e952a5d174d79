"""Each known mistake, put back, is seen within 500 seeds: the oracle is not blind to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from proof.simulation.mutants import MUTANTS, caught
from proof.simulation.schedule import play

WITHIN_SEEDS = 500
QUICK = ("events_numbered_by_the_workflow", "undo_without_an_id", "cancel_answered_at_once")
"""Seen soon: these stand for the rest in `make test`."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", QUICK)
def test_a_mistake_put_back_is_seen_soon(name: str) -> None:
    assert caught(name, range(WITHIN_SEEDS), play) is not None, f"{name} ({MUTANTS[name].pitfall}) goes unseen"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MUTANTS if name not in QUICK])
def test_a_mistake_put_back_is_seen(name: str) -> None:
    assert caught(name, range(WITHIN_SEEDS), play) is not None, f"{name} ({MUTANTS[name].pitfall}) goes unseen"
