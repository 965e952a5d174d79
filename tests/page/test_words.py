"""English and Chinese: every string in one file each, chosen by the browser and by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from comfyui_temporal.contracts.comfyui import JobStatus, TaskPriority, TrainingStage
from comfyui_temporal.contracts.errors import ExceptionCode, FailureCode
from comfyui_temporal.contracts.permissions import Scene
from comfyui_temporal.contracts.tasks import TaskStatus
from comfyui_temporal.delays import PAUSED, TERMINATED
from gateway.page import FOLDER
from tests.page.conftest import PAYER, Watched, opened
from tests.page.test_cards import ended_task
from tests.page.test_page import card, is_live
from tests.workflows.platform import task_id_of

STRING = re.compile(r'^  "([^"]+)": "(.*)",$', re.MULTILINE)
CJK = re.compile(r"[\u3400-\u9fff]")
DERIVED = ("status.", "scene.", "priority.", "stage.", "failure.")
"""Keys that are made from the contract's words."""
ENDS = (
    ("failed", {"code": "node_error", "message": "KSampler: The task broke."}),
    ("cancelled", {"code": "cancelled", "message": "The task was cancelled."}),
)
EXAMPLE = "start.prompt.example"
"""A prompt: tasks that were started with it show it in every language."""
OWN_WORDS = """() => {
    for (const quoted of document.body.querySelectorAll("[lang=en], code")) quoted.hidden = true;
    return document.body.innerText;
}"""
"""What the page itself says, without what it quotes: sentences of the platform, which are English, codes, addresses."""


def strings_of(name: str) -> dict[str, str]:
    return dict(STRING.findall((FOLDER / name).read_text()))


def sources() -> dict[Path, str]:
    return {path: path.read_text() for path in FOLDER.glob("*.js") if path.name not in ("en.js", "zh.js")}


def test_both_languages_have_the_same_strings_with_the_same_values_in_them() -> None:
    english, chinese = strings_of("en.js"), strings_of("zh.js")
    assert list(english) == list(chinese)
    for key, text in english.items():
        assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", chinese[key])), key
        assert CJK.search(chinese[key]), f"{key} is not translated"


def test_every_string_is_used_and_every_used_key_is_a_string() -> None:
    keys = set(strings_of("en.js"))
    everything = "\n".join([*sources().values(), (FOLDER / "index.html").read_text()])
    named = set(re.findall(r'"([a-z_]+(?:\.[a-z_]+)*)"', everything))
    used = set(re.findall(r'say\("([^"]+)"', everything)) | set(
        re.findall(r'data-say(?:-[a-z-]+)?="([^"]+)"', everything)
    )
    assert used <= keys
    unused = {key for key in keys - named if not key.startswith(DERIVED) and not key.endswith(".one")}
    assert unused == set()


def test_every_failure_and_every_status_has_a_sentence_of_the_page() -> None:
    codes = [*FailureCode, *ExceptionCode, PAUSED, TERMINATED]
    words: dict[str, Iterable[str]] = {
        "failure": codes,
        "status": TaskStatus,
        "scene": Scene,
        "priority": TaskPriority,
        "stage": [*JobStatus, *TrainingStage],
    }
    wanted = {f"{kind}.{word}" for kind, all_words in words.items() for word in all_words}
    assert wanted - set(strings_of("en.js")) == set()


def test_no_other_file_has_a_sentence_of_its_own() -> None:
    html = re.sub(r"<noscript>.*</noscript>|<title>.*</title>|<option[^>]*>(sd|hd|4k)</option>", "", _html())
    assert re.findall(r">\s*([A-Za-z][^<]*)<", html) == []
    for path, text in sources().items():
        literals = re.findall(r'textContent: "([^"]+)"|textContent = "([^"]+)"', text)
        assert literals == [], path.name


def _html() -> str:
    return (FOLDER / "index.html").read_text()


@pytest.mark.browser
async def test_the_browser_chooses_the_language_and_a_hand_chooses_another(browser: Browser, watched: Watched) -> None:
    handle = await watched.platform.start_image(prompt="灯塔")
    await handle.result()
    failed, cancelled = [
        await ended_task(watched, PAYER[0], at=datetime.now(UTC), status=status, error=error) for status, error in ENDS
    ]
    async with opened(browser, watched, locale="zh-CN") as seen:
        page = seen.page
        await expect(page.locator("#connection")).to_have_text("实时", timeout=10_000)
        assert await page.evaluate("document.documentElement.lang") == "zh"
        await expect(card(page, task_id_of(handle)).locator(".money")).to_have_text("已扣 24 积分", timeout=10_000)
        errors = [card(page, task_id).locator(".error") for task_id in (failed, cancelled)]
        await expect(errors[0]).to_have_text("node_error: 模板的一个节点出错。 KSampler: The task broke.")
        await expect(errors[0].locator("[lang=en]")).to_have_text("KSampler: The task broke.")
        await expect(errors[1]).to_have_text("cancelled: 任务被取消。 The task was cancelled.")
        shown = await page.evaluate(OWN_WORDS)
        english = {
            text for key, text in strings_of("en.js").items() if len(text) > 4 and "{" not in text and key != EXAMPLE
        }
        left = {text for text in english if re.search(rf"(?<![\w-]){re.escape(text)}(?![\w-])", shown)}
        assert left <= {"Temporal UI"}
        await page.get_by_label("语言").select_option("English")
        await is_live(page)
        await expect(card(page, task_id_of(handle)).locator(".money")).to_have_text("24 points charged")
        await expect(errors[1]).to_have_text("cancelled: The task was cancelled.")
        await page.reload()
        await is_live(page)
