"""A newcomer's first minutes: the README's commands on a fresh clone, in order, and how long each takes.

python -m proof.first_minutes                                    prints the recording
python -m proof.first_minutes --out docs/first-ten-minutes.md    writes it

The clone has its own environment and stack. Packages that pip and uv have downloaded before come from their caches.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from proof.document_blocks import PROJECT, RUNNABLE, Block, blocks_of

LIMIT_SECONDS: Final = 900
_NOT_A_NEWCOMERS: Final = (
    "COMFYUI",
    "TEMPORAL",
    "GATEWAY",
    "TOKEN",
    "DATASETS",
    "VIRTUAL_ENV",
    "PYTHON",
    "MAKE",
    "MFLAGS",
)
"""Variables that begin so would name another stack, or this checkout's environment."""
_PS4: Final = "+ ${EPOCHREALTIME} ${BASH_SOURCE[0]:-} ${LINENO} "
_TRACED: Final = re.compile(r"\++ ([\d.,]+) (\S+) (\d+) ")
"""Bash repeats PS4's first character for each level; a root's bash takes PS4 from no environment."""
_HEAD: Final = """# The first ten minutes

What a newcomer runs, and how long it takes: each command of the [README](../README.md), in its order, on a fresh clone.
Recorded by `make first-minutes` on {processors} processors, with packages that had been downloaded before.

| from the start | command | takes |
| ---: | --- | ---: |
"""


@dataclass(frozen=True)
class Step:
    """One command of the README. `at` and `seconds`: when it begins, and how long it takes."""

    command: str
    at: float
    seconds: float


def runnable(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in RUNNABLE and block.reason is None]


def commands_of(block: Block) -> dict[int, str]:
    """Line within the block → the command that begins there, as it is shown. A block of Python is one command."""
    if block.language == "python":
        title = next((name for name in ("HttpTasks", "SyncTasks", "TemporalTasks") if name in block.code), "Python")
        return {1: f"the example with `{title}`"}
    lines = block.code.splitlines()
    starts = [number for number, _ in enumerate(lines, 1) if number == 1 or not _goes_on(lines, number)]
    return {number: _shown(lines[number - 1]) for number in starts}


def _shown(line: str) -> str:
    command = line.partition(" #")[0].rstrip("\\ ").strip()
    return f"`{command}`"


def _goes_on(lines: Sequence[str], number: int) -> bool:
    """Whether this line belongs to the command before it."""
    return lines[number - 2].endswith("\\") or lines[number - 1].startswith(" ")


def recorded(clone: Path, folder: Path) -> list[Step]:
    """Run the README in `clone`. Raises CalledProcessError with all that was printed."""
    blocks = runnable(clone / "README.md")
    trace = folder / "trace"
    opening = ["set -eu", f"exec 9>{trace}", "BASH_XTRACEFD=9", f"PS4='{_PS4}'"]
    script = "\n".join([*opening, *_lines(blocks, folder), "set +x", ""])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_A_NEWCOMERS)}
    began = time.time()
    ended = subprocess.run(
        ["bash", "-c", script],
        cwd=clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    over = time.time()
    if ended.returncode:
        raise subprocess.CalledProcessError(ended.returncode, "README.md", output=ended.stdout)
    return list(_steps(trace.read_text(errors="replace"), blocks, folder, began, over))


def _file(number: int, block: Block, folder: Path) -> Path:
    return folder / f"{number}.{block.language}"


def _lines(blocks: Sequence[Block], folder: Path) -> Iterator[str]:
    for number, block in enumerate(blocks):
        file = _file(number, block, folder)
        file.write_text(block.code, encoding="utf-8")
        if block.language == "python":  # runs as one traced command of a file of its own
            wrapper = file.with_suffix(".sh")
            wrapper.write_text(f"PYTHONPATH=. .venv/bin/python {file}\n", encoding="utf-8")
            file = wrapper
        yield f"set -x; . {file}; {{ set +x; }} 2>/dev/null"


def _steps(trace: str, blocks: Sequence[Block], folder: Path, began: float, over: float) -> Iterator[Step]:
    """A command begins with the first line that is traced of it."""
    known = {
        (str(_file(number, block, folder).with_suffix(".sh")), line): command
        for number, block in enumerate(blocks)
        for line, command in commands_of(block).items()
    }
    starts: list[tuple[float, str]] = []
    seen: set[tuple[str, int]] = set()
    for text in trace.splitlines():
        traced = _TRACED.match(text)
        if traced is None:
            continue
        place = (traced[2], int(traced[3]))
        # What `eval` runs is counted as lines too: the first word tells it from the command that stands there.
        if place in known and place not in seen and _begins(known[place], text[traced.end() :]):
            seen.add(place)
            starts.append((float(traced[1].replace(",", ".")), known[place]))
    ends = [at for at, _ in starts[1:]] + [over]
    for (at, command), end in zip(starts, ends, strict=True):
        yield Step(command, at - began, end - at)


def _begins(command: str, traced: str) -> bool:
    return not command.startswith("`") or traced.split(" ", 1)[0] == command[1:].split(" ", 1)[0].rstrip("`")


def document(steps: Sequence[Step]) -> str:
    rows = [
        f"| {_clock(step.at)} | {step.command.replace('|', chr(92) + '|')} | {step.seconds:.1f} s |" for step in steps
    ]
    return _HEAD.format(processors=os.cpu_count()) + "\n".join(rows) + "\n"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m proof.first_minutes", description=__doc__, formatter_class=form)
    parser.add_argument("--out", type=Path, help="write the recording here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="first-minutes-", ignore_cleanup_errors=True) as made:
        clone, scripts = Path(made) / "comfyui-temporal", Path(made) / "scripts"
        Path(made).chmod(0o755)  # started by root, PostgreSQL runs as another user
        scripts.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(PROJECT), str(clone)], check=True)
        try:
            text = document(recorded(clone, scripts))
        except subprocess.CalledProcessError as error:
            print(str(error.output)[-4_000:], file=sys.stderr)
            return 1
        finally:
            subprocess.run(["make", "--silent", "down"], cwd=clone, check=False)
    if options.out is None:
        print(text, end="")
    else:
        options.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
