"""What `make up`, `make down`, `make demo`, `make status`, `make env` and `make logs` do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

import httpx

from comfyui_temporal.contracts.stack import StackDescription
from local_stack.background import Background, end_stack, running_stack, start_stack
from local_stack.child import is_running
from local_stack.comfyui_servers import silent_servers
from local_stack.dataset import demo_dataset
from local_stack.description import ACCOUNTS, PAGE_SECONDS, page_url
from local_stack.folder import RunFolder, StackFailure, StackRecord
from local_stack.log_reader import follow_logs
from local_stack.own_services import COMFYUI_URL, CREDITS_URL, own_url, sentences, silent_services
from local_stack.pace import DEMO_SPEED, REAL_SPEED
from local_stack.parts import DEFAULT_PROFILE, PROFILE_SETTING
from proof.simulators.admin_client import AdminRefused, CreditsAdmin

EXIT_NOT_UP: Final = 1
EXIT_INTERRUPTED: Final = 130


def up(folder: RunFolder, speed: float | None, comfyui: Sequence[str] = ()) -> int:
    """Start the stack and leave it running. A stack that is up already is left unchanged."""
    _refuse_another(folder, speed, comfyui)
    print("Starting the local stack …", flush=True)
    _say_each(sentences())
    _say_each(silent_servers(comfyui))
    _say_each(silent_services())
    started = start_stack(folder, pace_of(speed, comfyui), _print_line, comfyui, has_lifeline=False)
    stack = _described(folder)
    demo_dataset(folder.path, next(iter(ACCOUNTS)))
    _say_whether_started(folder, started)
    _show(folder, stack)
    print("\nTry `.venv/bin/comfyui-tasks --help`, or `make demo`. `make down` ends it.")
    print('This shell then knows its programs, addresses and a token: eval "$(make -s env)"')
    return 0


def down(folder: RunFolder) -> int:
    print("The stack has ended." if end_stack(folder) else f"No stack was up in {folder.path}.")
    return 0


def status(folder: RunFolder) -> int:
    """Show what runs, and where. The exit code is 1 if no stack is up."""
    stack = running_stack(folder)
    if stack is None:
        print(f"No stack is up in {folder.path}. Start one with `make up`.")
        return EXIT_NOT_UP
    _show(folder, stack)
    record = folder.record()
    for name, process in (record.processes if record is not None else {}).items():
        restarts = f", restarted {process.restarts} times" if process.restarts else ""
        print(f"  {name:<10} {'runs' if is_running(process) else 'is down'} (pid {process.pid}){restarts}")
    return 0


def env(folder: RunFolder) -> int:
    """Print what a shell needs to know of the running stack, to be evaluated. The exit code is 1 if none is up."""
    stack = running_stack(folder)
    if stack is None:
        sys.stderr.write(f"No stack is up in {folder.path}. Start one with `make up`.\n")
        return EXIT_NOT_UP
    tenant_id = next(iter(ACCOUNTS))
    print(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    for name, value in (
        ("TEMPORAL_ADDRESS", stack.temporal_address),
        ("GATEWAY", stack.gateway_url),
        ("TOKEN", stack.tokens[tenant_id]),
        ("DATASETS", str(folder.path / "datasets" / tenant_id)),
    ):
        print(f"export {name}={shlex.quote(value)}")
    return 0


def authorise(folder: RunFolder, template_ids: Sequence[str]) -> int:
    """Authorise the stack's accounts for templates of one's own: the simulated credits service knows the shipped ones.

    The exit code is 1 if no stack is up. Raises StackFailure for a credits service that is not the simulated one.
    """
    stack = running_stack(folder)
    if stack is None:
        sys.stderr.write(f"No stack is up in {folder.path}. Start one with `make up`.\n")
        return EXIT_NOT_UP
    try:
        asyncio.run(_authorise(stack, template_ids))
    except (AdminRefused, httpx.HTTPError):
        raise StackFailure(f"{stack.credits_url} is not the simulated credits service: authorise them there.") from None
    print(f"{' and '.join(ACCOUNTS)} may use {', '.join(template_ids)}.")
    return 0


async def _authorise(stack: StackDescription, template_ids: Sequence[str]) -> None:
    admin = CreditsAdmin(stack.credits_url, stack.admin_token)
    try:
        for tenant_id in ACCOUNTS:
            for template_id in template_ids:
                await admin.set_authorization(template_id, tenant_id)
    finally:
        await admin.close()


def logs(folder: RunFolder) -> int:
    """Follow the logs of all parts until Ctrl-C, which is how this ends."""
    with contextlib.suppress(KeyboardInterrupt):
        follow_logs(folder)
    return 0


def pace_of(speed: float | None, comfyui: Sequence[str]) -> float:
    """Real servers work at their own pace, and so must everything around them."""
    return speed or (REAL_SPEED if comfyui else DEMO_SPEED)


def _say_each(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(sentence, flush=True)


def demo(folder: RunFolder, speed: float | None, comfyui: Sequence[str] = ()) -> int:
    """Run one image and one training task on a stack. The stack is ended afterwards if it was started for this.

    Raises StackFailure where a stack is up that is another than the one asked for, or a real server does not answer.
    """
    _refuse_another(folder, speed, comfyui)
    _say_each(sentences())
    if silent := [*silent_servers(comfyui), *silent_services()]:
        raise StackFailure("\n".join([*silent, "Nothing was started."]))
    started = start_stack(folder, pace_of(speed, comfyui), _print_line, comfyui, has_lifeline=True)
    try:
        stack = _described(folder)
        _say_whether_started(folder, started)
        code = _run_demo(folder, stack)
        if started is not None and sys.stdin.isatty() and sys.stdout.isatty():
            _wait_for_enter()
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        print()
    finally:
        if started is not None:
            started.end()
    if started is not None:
        print("The stack has ended. `make up` shows these runs again, at the same addresses.")
    return code


def _run_demo(folder: RunFolder, stack: StackDescription) -> int:
    """Imported only here: the demo needs more packages than the stack."""
    demo = import_module("local_stack.demo")
    code: int = demo.run_demo(stack, folder.path, page_url=page_url(stack, demo.TENANT, folder.secrets()))
    return code


def _described(folder: RunFolder) -> StackDescription:
    stack = running_stack(folder)
    if stack is None:
        raise StackFailure(f"The stack ended right after its start: see {folder.log('stack')}.")
    return stack


def _wait_for_enter() -> None:
    with contextlib.suppress(EOFError):  # Ctrl-D says the same
        input("\nThe stack is still up, so that the links work. Press Enter to end it. ")


def _refuse_another(folder: RunFolder, speed: float | None, comfyui: Sequence[str]) -> None:
    """Raises StackFailure if a stack is up and is another than the one asked for: it would be used as it is."""
    record = folder.record()
    if running_stack(folder) is None or record is None:
        return
    profile = os.environ.get(PROFILE_SETTING)
    own = {setting: own_url(setting) for setting in (CREDITS_URL, COMFYUI_URL)}
    wanted = {
        f"SPEED={speed or 0:g}": speed is None or speed == record.speed,
        f"PROFILE={profile}": not profile or profile == record.credits_profile,
        f"COMFYUI={','.join(comfyui)}": not comfyui or list(comfyui) == record.comfyui,
        **{f"{name}={url}": url is None or record.own_services.get(name) == url for name, url in own.items()},
    }
    others = [what for what, agrees in wanted.items() if not agrees]
    if others:
        raise StackFailure(
            f"A stack is already up in {folder.path}, and not with {', '.join(others)}. Nothing was started: end that "
            "stack first with `make down`, or leave this out."
        )


def _say_whether_started(folder: RunFolder, started: Background | None) -> None:
    record = folder.record()
    if started is None and record is not None:
        print(f"A stack is already up in this folder and is used as it is (speed {record.speed:g}).")


def _show(folder: RunFolder, stack: StackDescription) -> None:
    record = folder.record()
    pace = f", {record.speed:g} times real pace" if record is not None else ""
    print(f"The stack is up, reachable from this machine only{pace}:")
    for name, where in (
        ("Temporal UI", stack.ui_url),
        ("Temporal", stack.temporal_address),
        ("gateway", stack.gateway_url),
        ("ComfyUI", f"{stack.comfyui_url} ({_behind(stack, record)})"),
        ("credits", f"{stack.credits_url} ({_credits(record)})"),
        ("described in", folder.path / "stack.json"),
        ("logs", folder.path / "logs"),
    ):
        print(f"  {name:<13} {where}")
    tenant_id = next(iter(ACCOUNTS))
    print(f"  {'live page':<13} {page_url(stack, tenant_id, folder.secrets())}")
    print(f"  {'':<13} (as {tenant_id}, for {PAGE_SECONDS // 60} minutes; `make status` prints a new link)")


def _credits(record: StackRecord | None) -> str:
    if record is not None and CREDITS_URL in record.own_services:
        return "your own"
    is_usual = record is None or record.credits_profile == DEFAULT_PROFILE
    return "simulated" if is_usual else f"simulated, profile {record.credits_profile}"  # type: ignore[union-attr]


def _behind(stack: StackDescription, record: StackRecord | None) -> str:
    if record is not None and COMFYUI_URL in record.own_services and not record.comfyui:
        return "your own"
    servers = sum(name.startswith("gpu-") for name in stack.pids)
    return f"the bridge, {servers} server{'s' if servers > 1 else ''} behind it" if servers else "simulated"


def _print_line(line: str) -> None:
    # A reader that stops early (`make up | head`) must not end a stack that is starting.
    with contextlib.suppress(BrokenPipeError):
        print(f"  {line}", flush=True)
