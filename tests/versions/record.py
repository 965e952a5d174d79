"""Record what this version passes on: `python -m tests.versions.record`.

Run it when a field is added to what our runs and workers pass to each other. It rewrites the newest version's folder
only: the folders of releases stay as they were released. With a release, give `NEWEST` the next version's name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from tests.versions.fullest import DOCUMENTS, fullest

VERSIONS: Final = Path(__file__).parent
NEWEST: Final = "0.2.0"


def rendered() -> dict[str, str]:
    """File name → text, for all that is passed on."""
    return {f"{name}.json": _text(fullest(model)) for name, model in DOCUMENTS.items()}


def _text(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main() -> None:
    folder = VERSIONS / NEWEST
    folder.mkdir(exist_ok=True)
    wanted = rendered()
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
