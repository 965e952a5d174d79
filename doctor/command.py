"""The command `doctor`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from comfyui_temporal.command_line import inputs
from comfyui_temporal.command_line.app import EXIT_CODES, Json, app, perform
from comfyui_temporal.command_line.connection import gateway_of, say_what_is_used
from comfyui_temporal.command_line.failures import ExitCode
from comfyui_temporal.command_line.reports import print_json
from comfyui_temporal.command_line.server import find_server
from comfyui_temporal.command_line.settings import CommandSettings, read_settings
from comfyui_temporal.contracts.fields import CallerId
from doctor.examination import examine, services, take_hold
from doctor.finding import Verdict
from doctor.report import print_findings
from doctor.token import examine_token
from runtime.settings import Settings


@app.command(epilog=EXIT_CODES)
def doctor(
    hold: Annotated[
        tuple[str, str, str] | None,
        typer.Option(
            metavar="TENANT USER TEMPLATE",
            help="Also request a hold of 1 point twice with one key, then cancel the result.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="JWT", help="Only say what this caller's token may do here; `-`: from stdin."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a set-up before it costs money.

    Temporal, its namespace, retention and search attributes, a worker, the credits service, ComfyUI and which
    optional routes it offers; and whether the worker uses the same services, which a small workflow
    reads from it. No job is started and nothing is changed; only --hold takes a hold, and gives it back.

    \b
    Examples:
      comfyui-tasks doctor
      comfyui-tasks doctor --hold tenant-demo user-demo text-to-image
      comfyui-tasks doctor --token - < token.txt
    """

    async def work() -> ExitCode:
        settings, connecting = read_settings(Settings), read_settings(CommandSettings)
        server = find_server(connecting)
        payer = hold and [
            inputs.checked(CallerId, name, value)
            for name, value in zip(("TENANT", "USER", "TEMPLATE"), hold, strict=True)
        ]
        say_what_is_used(server, connecting)
        if token is not None:
            given = sys.stdin.read() if token == "-" else token
            findings = await examine_token(given.strip(), settings, gateway_of(server, connecting))
        else:
            findings = await examine(settings, connecting, server)
        if payer and token is None:
            tenant_id, user_id, template_id = payer
            async with services(settings, server.stack, tenant_id=tenant_id, user_id=user_id) as opened:
                findings += await take_hold(opened, template_id)
        if as_json:
            print_json([finding.model_dump(mode="json") for finding in findings])
        else:
            print_findings(Console(), findings)
        is_fit = all(finding.verdict is not Verdict.WRONG for finding in findings)
        return ExitCode.COMPLETED if is_fit else ExitCode.FAILED

    perform(work, as_json=as_json)
