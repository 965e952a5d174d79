"""The clock keeps what was done when its speed changes or its process ends; transactions undo what they should."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proof.simulators.clock import Clock
from proof.simulators.state_file import StateFile


@contextmanager
def opened(path: Path) -> Iterator[StateFile]:
    state = StateFile(path / "state.sqlite3")
    try:
        yield state
    finally:
        state.close()


def test_work_done_stays_done_when_speed_changes_and_processes_end(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        clock = Clock(state, speed=10)
        clock.advance(100)
        assert clock.work() == pytest.approx(1_000, abs=50)
        clock.set_speed(1)
        clock.advance(100)
        assert clock.work() == pytest.approx(1_100, abs=50)
        before = clock.now()
    with opened(tmp_path) as state:
        clock = Clock(state, speed=100)
        assert clock.work() == pytest.approx(1_100, abs=50), "what was done at another speed stays done"
        assert clock.now() >= before, "what was advanced stays advanced"
        clock.advance(1)
        assert clock.work() == pytest.approx(1_200, abs=80)


def test_work_seconds_become_a_wall_time_at_the_present_speed(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        clock = Clock(state, speed=60)
        seconds = (clock.datetime_of(clock.work() + 120) - clock.now()).total_seconds()
        assert seconds == pytest.approx(2, abs=0.1)
        with pytest.raises(ValueError, match="never set back"):
            clock.advance(-1)


def test_an_inner_transaction_undoes_itself_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as state:
        state.lay_out("CREATE TABLE notes (text TEXT)")
        with state.transaction():
            state.run("INSERT INTO notes VALUES ('outer')")
            with contextlib.suppress(ZeroDivisionError), state.transaction():
                state.run("INSERT INTO notes VALUES ('inner')")
                raise ZeroDivisionError
        with contextlib.suppress(ZeroDivisionError), state.transaction():
            with state.transaction():
                state.run("INSERT INTO notes VALUES ('inner of a lost one')")
            raise ZeroDivisionError
        assert [row["text"] for row in state.rows("SELECT text FROM notes")] == ["outer"]
