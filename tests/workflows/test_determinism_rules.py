"""What guards workflow code in the sandbox's place (comfyui_temporal/plugin.py): ruff's rules for that folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

CALLS = {
    "the clock": "from datetime import datetime\n\nnow = datetime.now()\n",
    "time": "import time\n\nnow = time.time()\n",
    "chance": "import random\n\nchance = random.random()\n",
    "a made-up id": "import uuid\n\nmade = uuid.uuid4()\n",
    "a secret": "import secrets\n\nmade = secrets.token_hex()\n",
    "the surroundings": 'import os\n\nhome = os.environ["HOME"]\n',
    "a thread": "import threading\n\nthread = threading.Thread()\n",
    "asyncio's wait": "import asyncio\n\nwait = asyncio.wait\n",
    "asyncio's sleep": "import asyncio\n\nsleep = asyncio.sleep\n",
}


@pytest.mark.parametrize("code", CALLS.values(), ids=CALLS)
def test_what_differs_between_runs_is_refused_in_workflow_code(code: str) -> None:
    def rules_broken(path: str) -> str:
        command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--output-format", "concise"]
        return subprocess.run(
            [*command, "--stdin-filename", path, "-"], input=code, capture_output=True, text=True, check=False
        ).stdout

    assert "TID251" in rules_broken("workflows/new_step.py")
    assert "TID251" not in rules_broken("activities/new_call.py")
