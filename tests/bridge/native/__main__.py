"""`python -m tests.bridge.native --port 8188`: runs the stand-in as ComfyUI is run, with its own folder of files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import uvicorn

from proof.simulators.connections import CuttableProtocol
from tests.bridge.native.app import native_app
from tests.bridge.native.traps import Traps


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for ComfyUI's native API.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8188)
    parser.add_argument("--folder", type=Path, default=Path(".run/native"), help="folder of output, temp and input")
    parser.add_argument("--traps", default="{}", help="JSON of tests/bridge/native/traps.py")
    parser.add_argument("--starts-after", type=float, default=0.0, help="seconds before it listens")
    chosen = parser.parse_args()
    time.sleep(chosen.starts_after)
    app = native_app(chosen.folder.resolve(), Traps.model_validate_json(chosen.traps))
    uvicorn.run(
        app,
        host=chosen.host,
        port=chosen.port,
        http=CuttableProtocol,
        ws="websockets-sansio",
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,  # as ComfyUI's own server
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
