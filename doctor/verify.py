"""`python -m doctor.verify`: replay a live namespace's histories on this build before it is deployed.

It takes the workers' Temporal settings and encryption keys, reads, and changes nothing. Exit code 0: all that was to be
replayed goes on. 1: some runs would be stuck. 2: not all could be looked at, and none of what was would be stuck.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from typing import Final

from temporalio.client import Client
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter

from bridge.__main__ import WORKFLOWS as BRIDGE_WORKFLOWS
from comfyui_temporal.process_end import end_process
from doctor.replay import Bounds, CouldNotLook, Report, replay_namespace
from runtime import temporal_connection
from runtime.required_settings import CannotStart, read_settings
from runtime.settings import Settings
from worker import WORKFLOWS

CONNECT_SECONDS: Final = 10.0
MEBIBYTE: Final = 1024 * 1024
EXIT_STUCK: Final = 1
EXIT_NOT_LOOKED: Final = 2
THIS_BUILD: Final = (*WORKFLOWS, *BRIDGE_WORKFLOWS)
"""Every workflow that this build's workers and bridge run."""


async def verify(settings: Settings, bounds: Bounds) -> Report:
    """Raises CouldNotLook."""
    runtime = _quiet_runtime()
    client = await _connected(settings, runtime)
    return await replay_namespace(client, THIS_BUILD, bounds, runtime=runtime)


async def _connected(settings: Settings, runtime: Runtime) -> Client:
    try:
        return await asyncio.wait_for(temporal_connection.connect(settings, runtime=runtime), CONNECT_SECONDS)
    except TimeoutError:
        cause = f"no answer within {CONNECT_SECONDS:g} s"
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0].rstrip(".")
    address = settings.temporal_address or "the address of Temporal's environment configuration"
    raise CouldNotLook(
        f"Temporal at {address} cannot be reached: {cause}. Check that the server runs, and TEMPORAL_ADDRESS, "
        "TEMPORAL_API_KEY and TLS."
    )


def _quiet_runtime() -> Runtime:
    """The SDK logs each failed replay with its whole history; here one sentence says it."""
    errors_only = LoggingConfig(filter=TelemetryFilter(core_level="OFF", other_level="OFF"))
    return Runtime(telemetry=TelemetryConfig(logging=errors_only))


def lines_of(report: Report) -> list[str]:
    """The report as a person reads it, what is wrong first."""
    replayed = f"{report.replayed['open']} open and {report.replayed['closed']} closed runs were replayed"
    good = sum(report.replayed.values()) - len(report.failures)
    return [*report.failures, *report.left_out, *report.notes, f"{replayed} on this build: {good} of them go on."]


def exit_code_of(report: Report) -> int:
    if report.failures:
        return EXIT_STUCK
    return EXIT_NOT_LOOKED if report.left_out else 0


def bounds_by(arguments: list[str]) -> Bounds:
    most = Bounds()
    parser = argparse.ArgumentParser(prog="python -m doctor.verify", description=(__doc__ or "").strip())
    parser.add_argument(
        "--closed", type=int, default=most.closed, help="newest closed runs of each type (default %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=most.seconds, help="default %(default)g")
    parser.add_argument(
        "--megabytes",
        type=int,
        default=most.history_bytes // MEBIBYTE,
        help="a larger history is not replayed (default %(default)s)",
    )
    given = parser.parse_args(arguments)
    return Bounds(closed=given.closed, seconds=given.seconds, history_bytes=given.megabytes * MEBIBYTE)


def main(arguments: list[str] | None = None) -> int:
    bounds = bounds_by(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("temporalio").setLevel(logging.CRITICAL)
    try:
        report = asyncio.run(verify(read_settings(), bounds))
    except (CannotStart, CouldNotLook) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_NOT_LOOKED
    sys.stdout.write("".join(f"{line}\n" for line in lines_of(report)))
    return exit_code_of(report)


if __name__ == "__main__":
    end_process(main())
