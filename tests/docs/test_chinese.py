"""README.zh-CN.md says what README says: the same headings, commands, tables, names and links, in the same order."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

import pytest

from proof.document_blocks import PROJECT, blocks_of

ENGLISH: Final = PROJECT / "README.md"
CHINESE: Final = PROJECT / "README.zh-CN.md"
_CODE_BLOCK: Final = re.compile(r"^(?:<!-- [^\n]* -->\n)?```.*?^```$", re.MULTILINE | re.DOTALL)
_LANGUAGES: Final = {"README.md", "README.zh-CN.md"}


def parts(text: str) -> list[str]:
    """Headings, paragraphs, lists and tables, without code blocks."""
    return [part for part in re.split(r"\n\s*\n", _CODE_BLOCK.sub("", text)) if part.strip()]


def names(part: str) -> Counter[str]:
    """What a part names: code, the addresses of links, figures."""
    code = re.findall(r"`([^`]+)`", part)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", part) if link not in _LANGUAGES]
    return Counter([*code, *links])


PAIRS = list(zip(parts(ENGLISH.read_text(encoding="utf-8")), parts(CHINESE.read_text(encoding="utf-8")), strict=False))


def test_both_have_the_same_parts() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ENGLISH, CHINESE)]
    assert len(parts(texts[0])) == len(parts(texts[1]))
    levels = [re.findall(r"^(#+) ", _CODE_BLOCK.sub("", text), re.MULTILINE) for text in texts]
    assert levels[0] == levels[1]


def test_the_commands_and_examples_are_the_same() -> None:
    ours, theirs = (
        [(block.language, block.code, block.reason) for block in blocks_of(page)] for page in (ENGLISH, CHINESE)
    )
    assert ours == theirs


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=[part[:30] for part, _ in PAIRS])
def test_a_part_names_the_same_things(ours: str, theirs: str) -> None:
    assert names(ours) == names(theirs)
    if ours.startswith("|"):
        rows, translated = ours.splitlines(), theirs.splitlines()
        assert [row.count("|") for row in rows] == [row.count("|") for row in translated]
        assert [names(row) for row in rows] == [names(row) for row in translated]
    assert ours.startswith(("[", "# comfyui")) or re.search(r"[\u4e00-\u9fff]", theirs), "it is translated"
