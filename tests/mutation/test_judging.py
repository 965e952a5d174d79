"""Who kills a mutant, and that nothing of it is left behind.

Judged in a process of its own, as `python -m proof.mutation` does it: one that forks must have no threads.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from proof.mutation.judging import Fate, Verdict, spread
from proof.mutation.mutations import ROOT, mutations_of
from proof.mutation.reach import Seed
from proof.mutation.verdicts import Verdicts


def in_a_process(body: str, tmp_path: Path) -> Any:
    """What `answer` is once `body` has run."""
    before = f"import json\nfrom pathlib import Path\nfolder = Path({str(tmp_path)!r})"
    code = f"{before}\n{dedent(body)}\nprint(json.dumps(answer))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def verdict_on(module: str, becomes: str, tmp_path: Path, *, seeds: int = 0, tests: tuple[str, ...] = ()) -> Any:
    """Fate and killer of this change, judged by the first seeds of images and by these tests."""
    return in_a_process(
        f"""
        from proof.mutation.judging import Effort, Judge, load_what_others_wrote
        from proof.mutation.mutations import mutations_of
        from proof.mutation.reach import Reach, Seed

        [mutation] = [each for each in mutations_of({module!r}) if each.becomes == {becomes!r}]
        block = f"{{mutation.module}}:{{mutation.block}}"
        reach = Reach({{block: [Seed("image", "contract", n) for n in range({seeds})]}}, {{block: {list(tests)!r}}})
        reach.seconds = {{test: 1.0 for test in {tests!r}}}
        load_what_others_wrote()
        verdict = Judge(reach, Effort(100, 60), {{}}, folder).verdict(mutation)
        answer = [verdict.fate.value, verdict.by]
        """,
        tmp_path,
    )


DETAILS = "tests/workflows/test_details.py"


def test_the_simulation_kills_a_stop_that_has_no_effect(tmp_path: Path) -> None:
    fate, by = verdict_on("workflows/stop.py", "if not self.requested:", tmp_path, seeds=40)

    assert fate == "simulation"
    assert by.startswith("image ")


def test_a_test_kills_what_no_seed_sees(tmp_path: Path) -> None:
    test = f"{DETAILS}::test_a_task_that_has_ended_waits_for_nothing"

    assert verdict_on("workflows/details.py", "if (not what):", tmp_path, seeds=3, tests=(test,)) == ["tests", test]


@pytest.mark.slow
def test_a_mutant_that_no_test_fails_on_survives(tmp_path: Path) -> None:
    test = f"{DETAILS}::test_a_task_that_has_ended_waits_for_nothing"

    assert verdict_on("workflows/stop.py", 'removed: self.reason = ""', tmp_path, tests=(test,)) == ["survived", ""]


def test_a_mutant_that_nothing_executes_is_reported_unreached(tmp_path: Path) -> None:
    assert verdict_on("workflows/stop.py", 'removed: self.reason = ""', tmp_path) == ["unreached", ""]


@pytest.mark.slow
def test_the_source_tree_is_unchanged(tmp_path: Path) -> None:
    before = (ROOT / "workflows/stop.py").read_bytes()

    verdict_on("workflows/stop.py", "if not self.requested:", tmp_path, seeds=3)

    assert (ROOT / "workflows/stop.py").read_bytes() == before


@pytest.mark.parametrize(
    ("call", "wall_seconds", "problem"),
    [
        ("(lambda: 1 / 0)", 60, "Broke: ZeroDivisionError: division by zero"),
        (
            "(lambda: [None for _ in iter(int, 1)])",
            60,
            "RanOn: not ended after 1 s of processor time, or its process died",
        ),
        ("(lambda: time.sleep(60))", 3, "RanOn: not ended after 3 s"),
        ("(lambda: os._exit(3))", 60, "RanOn: not ended after 1 s of processor time, or its process died"),
        ("(lambda: bytearray(1 << 40))", 60, "Broke: MemoryError: "),
    ],
)
def test_a_call_that_raises_or_does_not_end_is_named(
    call: str, wall_seconds: int, problem: str, tmp_path: Path
) -> None:
    said = in_a_process(
        f"""
        import os, time
        from proof.mutation.forked import Broke, RanOn, forked

        try:
            answer = forked({call}, cpu_seconds=1, wall_seconds={wall_seconds}, log=folder / "log")
        except (Broke, RanOn) as error:
            answer = f"{{type(error).__name__}}: {{error}}"
        """,
        tmp_path,
    )
    assert said == problem


def test_processes_that_a_call_started_end_with_it(tmp_path: Path) -> None:
    """Also a process that left its parent's session, as PostgreSQL does."""
    pid = in_a_process(
        """
        import os, subprocess
        from proof.mutation.forked import adopt_orphans, forked

        adopt_orphans()
        start = ["sh", "-c", "setsid sleep 60 >/dev/null 2>&1 & echo $!"]
        started = lambda: int(subprocess.run(start, stdout=subprocess.PIPE).stdout)
        answer = forked(started, cpu_seconds=5, wall_seconds=30, log=folder / "log")
        """,
        tmp_path,
    )
    assert not Path(f"/proc/{pid}").exists()


def test_seeds_are_chosen_in_turn_from_every_kind_and_profile() -> None:
    images = [Seed("image", "contract", number) for number in (1, 5, 9)]
    field, training = Seed("image", "field", 4), Seed("training", "contract", 2)

    assert spread([*images, field, training], 4) == [images[0], field, training, images[1]]


def test_a_kill_is_kept_and_a_survival_only_while_the_judges_are_the_same(tmp_path: Path) -> None:
    killed, survived, other = mutations_of("workflows/undo.py")[:3]
    verdicts = Verdicts(tmp_path / "verdicts.jsonl", "these judges")
    verdicts.add(killed, Verdict(Fate.KILLED_BY_TESTS, "tests/a.py::b"))
    verdicts.add(survived, Verdict(Fate.SURVIVED))
    with (tmp_path / "verdicts.jsonl").open("a") as file:
        file.write('{"key": "cut of')

    same = Verdicts(tmp_path / "verdicts.jsonl", "these judges")
    stronger = Verdicts(tmp_path / "verdicts.jsonl", "stronger judges")

    assert [each.of(survived) for each in (same, stronger)] == [Verdict(Fate.SURVIVED), None]
    assert stronger.of(killed) == Verdict(Fate.KILLED_BY_TESTS, "tests/a.py::b")
    assert stronger.of(other) is None
    assert stronger.killers() == {"workflows/undo.py": ["tests/a.py::b"]}
