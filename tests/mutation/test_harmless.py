"""The list of survivors that do no harm is true of today's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from proof.mutation.harmless import Entry, Harmless
from proof.mutation.mutations import modules, mutations_in, mutations_of

MODULE = "workflows/example.py"
SOURCE = b"def f(a):\n    if a < 3:\n        g()\n"


def test_every_entry_names_a_change_that_can_be_made() -> None:
    everywhere = [mutation for module in modules([]) for mutation in mutations_of(module)]

    assert Harmless.read().stale(everywhere) == []


def test_a_change_is_known_by_its_function_and_its_line() -> None:
    [boundary, *others] = [each for each in mutations_in(MODULE, SOURCE) if each.line == 2]
    harmless = Harmless([Entry(MODULE, "f", ("if a <= 3:",), "three never comes")])

    assert harmless.reason(boundary) == "three never comes"
    assert [harmless.reason(each) for each in others] == [None, None]


@pytest.mark.parametrize(
    "entry",
    [
        Entry(MODULE, "f", ("if a <= 4:",), "another line"),
        Entry(MODULE, "g", ("if a <= 3:",), "another function"),
        Entry("workflows/other.py", "f", ("if a <= 3:",), "another module"),
    ],
    ids=lambda entry: entry.reason,
)
def test_an_entry_that_matches_nothing_is_stale(entry: Entry) -> None:
    stale = Harmless([entry]).stale(mutations_in(MODULE, SOURCE))

    assert stale == [f"{entry.module} | {entry.function} | {entry.becomes[0]}"]


def test_a_deleted_module_is_stale() -> None:
    assert Harmless([], [MODULE, "workflows/gone.py"]).stale(mutations_in(MODULE, SOURCE)) == ["workflows/gone.py"]


@pytest.mark.parametrize("reason", ["", 'reason = " "', 'reason = "as it is"\nline = 3'])
def test_an_entry_needs_a_reason_and_has_nothing_else(reason: str, tmp_path: Path) -> None:
    file = tmp_path / "harmless.toml"
    file.write_text(f'read = []\n[[harmless]]\nmodule = "m"\nfunction = "f"\nbecomes = ["x"]\n{reason}\n')

    with pytest.raises(ValueError, match=r"harmless\.toml: an entry has module, function, becomes and reason"):
        Harmless.read(file)
