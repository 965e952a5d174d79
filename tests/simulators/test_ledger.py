"""The ledger stays consistent under any order of calls, and its check finds each contradiction."""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proof.simulators.clock import Clock
from proof.simulators.ledger import Ledger, Person
from proof.simulators.replies import Refused
from proof.simulators.state_file import StateFile

PAYERS = (Person("a", "u"), Person("b", "u"))
STEPS = st.tuples(
    st.sampled_from(["hold", "commit", "cancel", "charge", "advance", "grant"]),
    st.integers(0, 1),
    st.integers(-2, 120),
)


@contextmanager
def open_ledger() -> Iterator[tuple[StateFile, Clock, Ledger]]:
    with tempfile.TemporaryDirectory() as folder:
        state = StateFile(Path(folder) / "ledger.sqlite3")
        clock = Clock(state, speed=1)
        ledger = Ledger(state, clock)
        for person in PAYERS:
            ledger.set_balance(person, 200)
        try:
            yield state, clock, ledger
        finally:
            state.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_no_order_of_calls_breaks_the_ledger(steps: list[tuple[str, int, int]]) -> None:
    with open_ledger() as (state, clock, ledger):
        for step, payer, amount in steps:
            ledger.expire_due()
            holds = [hold for hold in ledger.all_holds() if hold.tenant_id == PAYERS[payer].tenant_id]
            picked = ledger.find_hold(holds[amount % len(holds)].pre_deduct_id) if holds else None
            with contextlib.suppress(Refused), state.transaction():
                if step == "hold" and amount > 0:
                    ledger.hold(PAYERS[payer], task_id="t", template_id="x", scene="s", amount=amount, expire_in=60)
                elif step == "commit" and picked:
                    ledger.commit(picked, amount)
                elif step == "cancel" and picked:
                    ledger.cancel(picked, "no longer wanted")
                elif step == "charge" and amount > 0:
                    ledger.charge(PAYERS[payer], task_id="t", amount=amount, reason="rest")
                elif step == "advance":
                    clock.advance(abs(amount))
                elif step == "grant":
                    ledger.set_balance(PAYERS[payer], abs(amount))
            check = ledger.check()
            assert check.ok, check.problems


def test_the_file_refuses_a_second_resolution_and_any_edit() -> None:
    with open_ledger() as (state, _, ledger):
        hold, _ = (
            ledger.hold(PAYERS[0], task_id="t", template_id="x", scene="s", amount=50, expire_in=60) for _ in range(2)
        )
        ledger.commit(hold, 20)
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            ledger.cancel(hold, "a stale copy says that it is open")
        with pytest.raises(sqlite3.IntegrityError, match="never edited"):
            state.run("UPDATE entries SET change = 1")
        with pytest.raises(sqlite3.IntegrityError, match="never edited"):
            state.run("UPDATE postings SET amount = 1")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE accounts SET balance = balance + 1 WHERE tenant_id = 'a'", "a/u"),
        ("UPDATE accounts SET frozen = 0 WHERE tenant_id = 'a'", "a/u"),
        ("DELETE FROM postings WHERE account = 'revenue'", "debits and credits differ"),
        ("UPDATE holds SET phase = 'committed' WHERE phase = 'open'", "ends"),
        ("DELETE FROM entries WHERE kind = 'commit'", "ends"),
    ],
)
def test_the_check_finds_every_contradiction(change: str, named: str) -> None:
    with open_ledger() as (state, _, ledger):
        for _ in range(2):
            hold = ledger.hold(PAYERS[0], task_id="t", template_id="x", scene="s", amount=50, expire_in=60)
        ledger.commit(hold, 20)
        assert ledger.check().ok
        state.run(change)
        assert any(named in problem for problem in ledger.check().problems)
