"""Recorded histories as files."""

from __future__ import annotations

import re
from pathlib import Path

from temporalio.client import WorkflowHistory

PLACES = re.compile(r'File \\"/[^"]*/(?=(?:site-packages|workflows|activities|bridge|comfyui_temporal|store)/)')
"""Where a stack trace's file stands on the machine that recorded it."""


def keep(history: WorkflowHistory, file: Path) -> None:
    """Write a history without the recording machine's own paths."""
    file.write_text(PLACES.sub(r'File \\"', history.to_json()) + "\n")
