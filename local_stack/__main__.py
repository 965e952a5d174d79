"""`python -m local_stack up|down|demo|status|env|logs|authorise`: see `make help`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Final

from comfyui_temporal.process_end import end_process
from local_stack.commands import EXIT_INTERRUPTED, authorise, demo, down, env, logs, status, up
from local_stack.folder import DEFAULT_FOLDER, RunFolder, StackFailure
from local_stack.own_services import CREDITS_URL, read_dotenv
from local_stack.pace import DEMO_SPEED
from local_stack.parts import PROFILE_SETTING
from local_stack.supervisor import supervise
from proof.simulators.credits_profile import PROFILES


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if getattr(given, "credits_profile", None):
        os.environ[PROFILE_SETTING] = given.credits_profile  # as if the user had set it: every part inherits it
    if getattr(given, "credits", None):
        os.environ[CREDITS_URL] = given.credits
    read_dotenv()
    try:
        folder = RunFolder(given.folder)
        if given.command == "supervise":
            return supervise(folder, given.speed or DEMO_SPEED, given.comfyui, has_lifeline=given.lifeline)
        if given.command == "authorise":
            return authorise(folder, given.template_id)
        if given.command in _BY_FOLDER:
            return _BY_FOLDER[given.command](folder)
        return (up if given.command == "up" else demo)(folder, given.speed, given.comfyui)
    except StackFailure as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone
        return EXIT_UNREAD


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m local_stack", description="The whole system on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the stack keeps its files")
    paced = argparse.ArgumentParser(add_help=False)
    paced.add_argument("--speed", type=_speed, help=f"multiple of the real pace (default {DEMO_SPEED:g})")
    paced.add_argument(
        "--comfyui",
        type=_server,
        action="append",
        default=[],
        metavar="URL",
        help="a real ComfyUI server, reached through the bridge, instead of the simulated one; may be repeated",
    )
    paced.add_argument(
        "--credits",
        type=_service,
        metavar="URL",
        help="a credits service of your own, instead of the simulated one; its secret: COMFYUI_TEMPORAL_SERVICE_SECRET",
    )
    paced.add_argument(
        "--credits-profile",
        choices=list(PROFILES),
        help="which credits service is simulated: one by our contract, or the platform's own (field)",
    )
    commands.add_parser("up", parents=[common, paced], help="start the stack and leave it running")
    commands.add_parser("down", parents=[common], help="end it")
    commands.add_parser("demo", parents=[common, paced], help="run one image and one training task")
    commands.add_parser("env", parents=[common], help="print what a shell needs to know of it")
    commands.add_parser("logs", parents=[common], help="follow the logs of all parts")
    commands.add_parser("status", parents=[common], help="show what runs, and where")
    allowed = commands.add_parser(
        "authorise",
        parents=[common],
        help="let its accounts use templates of your own, at the simulated credits service",
    )
    allowed.add_argument("template_id", nargs="+")
    supervisor = commands.add_parser("supervise", parents=[common, paced], help="run the stack in this process")
    supervisor.add_argument("--lifeline", action="store_true", help="end when standard input is closed")
    return parser


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed <= MAX_SPEED:
        raise argparse.ArgumentTypeError(f"must be a number above 0, at most {MAX_SPEED:g}")
    return speed


def _server(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise argparse.ArgumentTypeError("must be the address of a ComfyUI server, like http://127.0.0.1:8188")
    return text.rstrip("/")


def _service(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s]+", text):
        raise argparse.ArgumentTypeError("must be the address of a credits service, like http://127.0.0.1:8190")
    return text.rstrip("/")


_BY_FOLDER: Final = {"down": down, "status": status, "env": env, "logs": logs}
MAX_SPEED = 10_000.0
EXIT_UNREAD = 141

if __name__ == "__main__":
    end_process(main())
