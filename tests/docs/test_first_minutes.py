"""The recording of a newcomer's first minutes: each command once, in the README's order, with its time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from proof.first_minutes import document, recorded

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
true two
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
    assert [step.command for step in steps] == ["`true one`", "`sleep 0.2`", '`echo "$(printf a)"`', "`true two`"]
    assert [step.seconds >= 0.2 for step in steps] == [False, True, False, False]
    assert [step.at for step in steps] == sorted(step.at for step in steps)
    assert "| 0:00 | `sleep 0.2` | 0.2 s |" in document(steps)


def test_a_command_that_fails_ends_the_recording(tmp_path: Path, scripts: Path) -> None:
    (tmp_path / "README.md").write_text("```sh\ntrue\necho the reason; false\ntrue\n```\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        recorded(tmp_path, scripts)
    assert "the reason" in failed.value.output
