"""The recording of a newcomer's first minutes: each command once, in the README's order, with its time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from proof.document_blocks import PROJECT
from proof.first_minutes import commands_of, document, recorded, runnable

README = """
```sh
true one
sleep 0.2    # a comment
echo "$(printf a)" \\
  b
```

<!-- not run: it would fail -->
```sh
false
```

```sh
eval "$(printf 'FIRST=1\\nSECOND=2\\nTHIRD=3')"
true two
sleep 0.3
```
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "scripts"
    folder.mkdir()
    return folder


def test_each_command_is_timed_in_order(tmp_path: Path, scripts: Path) -> None:
    (tmp_path / "README.md").write_text(README)
    steps = recorded(tmp_path, scripts)
    commands = ["`true one`", "`sleep 0.2`", '`echo "$(printf a)"`']
    commands += ["`eval \"$(printf 'FIRST=1\\nSECOND=2\\nTHIRD=3')\"`", "`true two`", "`sleep 0.3`"]
    assert [step.command for step in steps] == commands
    assert steps[1].seconds >= 0.2 and steps[5].seconds >= 0.3
    assert [step.at for step in steps] == sorted(step.at for step in steps)
    assert re.search(r"\| 0:00 \| `sleep 0\.2` \| \d\.\d s \|", document(steps))


def test_a_command_that_fails_ends_the_recording(tmp_path: Path, scripts: Path) -> None:
    (tmp_path / "README.md").write_text("```sh\ntrue\necho the reason; false\ntrue\n```\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        recorded(tmp_path, scripts)
    assert "the reason" in failed.value.output


def test_the_recording_is_of_the_readmes_commands() -> None:
    page = (PROJECT / "docs" / "first-ten-minutes.md").read_text()
    shown = re.findall(r"^\| \d+:\d\d \| (.*) \| [\d.]+ s \|$", page, re.MULTILINE)
    commands = [command for block in runnable(PROJECT / "README.md") for command in commands_of(block).values()]
    assert shown == [command.replace("|", "\\|") for command in commands], "record it again: make first-minutes"
