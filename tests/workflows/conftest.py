"""A platform for each scenario, with a worker on it; one time-skipping server for the session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from temporalio.common import SearchAttributeKey
from temporalio.testing import TimeSkippingConfig, WorkflowEnvironment

from comfyui_temporal.contracts.tasks import SEARCH_ATTRIBUTES
from comfyui_temporal.plugin import TasksPlugin
from local_stack.temporal_server import dynamic_config_flags
from proof.simulators.credits_profile import CONTRACT, FIELD, PROFILES, CreditsProfile
from store import TaskStore
from tests.cable import Cable, cable_to_postgres
from tests.conftest import server_config, temporal_binary
from tests.workflows.platform import Platform, running_platform


@pytest.fixture(scope="session", autouse=True)
def replayed_at_every_step(pytestconfig: pytest.Config) -> Iterator[None]:
    """With `--uncached` every worker of every test here replays the whole history at every step."""
    if pytestconfig.getoption("uncached"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Platform, "cached_workflows", 0)
            patch.setenv("COMFYUI_TEMPORAL_MAX_CACHED_WORKFLOWS", "0")  # for workers that are processes
            yield
    else:
        yield


@pytest.fixture(scope="session", autouse=True)
def every_callback_a_signal(pytestconfig: pytest.Config) -> Iterator[None]:
    """With `--signals` no gateway of any test here stores ticks, and no worker looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        if pytestconfig.getoption("signals"):
            patch.setenv("COMFYUI_TEMPORAL_SHORT_WAY", "false")
        yield


@pytest.fixture
def short_way(pytestconfig: pytest.Config) -> None:
    """Of tests that are about ticks."""
    if pytestconfig.getoption("signals"):
        pytest.skip("no tick takes the short way with --signals")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Scenarios run on both credits profiles (contract §4)."""
    if "credits_profile" in metafunc.fixturenames:
        metafunc.parametrize("credits_profile", PROFILES.values(), ids=list(PROFILES), scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On the `field` profile they run in the slow suite; `on_both_profiles`: in `make test-long`.

    `by_contract("why")`: left out, because only a service by our contract does this.
    """
    left_out = []
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
            continue
        if item.callspec.params.get("credits_profile") is not FIELD:
            continue
        if item.get_closest_marker("by_contract"):
            left_out.append(item)
        else:
            item.add_marker(pytest.mark.long if item.get_closest_marker("on_both_profiles") else pytest.mark.slow)
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def credits_profile() -> CreditsProfile:
    """Which credits service the platform has; given by `pytest_generate_tests`."""
    return CONTRACT


@pytest.fixture(params=[None], ids=["as set"])
def cached_workflows(request: pytest.FixtureRequest) -> int | None:
    """How many runs the worker keeps in memory; 0 replays the whole history at every step."""
    size: int | None = request.param
    return size


@pytest_asyncio.fixture
async def platform(
    temporal_env: WorkflowEnvironment,
    task_store: TaskStore,
    tmp_path: Path,
    cached_workflows: int | None,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    """A platform on the wall clock, where an image takes about a second."""
    cache: dict[str, Any] = {} if cached_workflows is None else {"max_cached_workflows": cached_workflows}
    running = running_platform(temporal_env, task_store, tmp_path, credits_profile=credits_profile)
    async with running as platform, platform.worker(**cache):
        yield platform


@pytest_asyncio.fixture(scope="module")
async def brisk_platform(
    temporal_env: WorkflowEnvironment,
    task_store: TaskStore,
    tmp_path_factory: pytest.TempPathFactory,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    """One platform for a module's many small scenarios: work takes no time, deadlines are far, there are many GPUs.

    Faults name their task. The read limit is 1 s, so that a longer delay fails quickly.
    """
    folder = tmp_path_factory.mktemp("brisk")
    running = running_platform(temporal_env, task_store, folder, speed=8_000, credits_profile=credits_profile)
    async with running as platform:
        platform.policy = {"deadline_factor": 5_000.0, "retry_after_seconds": [0.05, 0.05, 0.05]}
        platform.read_seconds = 1.0
        for gpu_type in ("rtx4090", "a100"):
            await platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
        async with platform.worker():
            yield platform


@pytest_asyncio.fixture(scope="module")
async def direct_platform(
    temporal_env: WorkflowEnvironment, task_store: TaskStore, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Platform]:
    """No gateway, no polls, and jobs that take minutes: a run gets only the messages that a scenario sends."""
    folder = tmp_path_factory.mktemp("direct")
    async with running_platform(temporal_env, task_store, folder, speed=1.0, gateway=False) as platform:
        await platform.simulators.admin.comfyui.fault("callback_withhold", times=None)
        platform.policy = {"poll_after_seconds": 3_600.0, "poll_at_most_seconds": 3_600.0}
        platform.policy["retry_after_seconds"] = [0.05]
        for gpu_type in ("rtx4090", "a100"):
            await platform.simulators.admin.comfyui.set_gpus(gpu_type, 200)
        async with platform.worker():
            yield platform


@pytest_asyncio.fixture
async def cable(postgres_dsn: str) -> AsyncIterator[Cable]:
    """The connection to PostgreSQL, which a scenario can cut."""
    async with cable_to_postgres(postgres_dsn) as cable:
        yield cable


@pytest_asyncio.fixture(scope="session")
async def skipping_env() -> AsyncIterator[WorkflowEnvironment]:
    """A real Temporal server whose runs' clocks can be moved; otherwise they run with the wall clock."""
    async with await WorkflowEnvironment.start_time_skipping_v2(
        ts_config=TimeSkippingConfig(enabled=False),
        plugins=[TasksPlugin()],
        search_attributes=[SearchAttributeKey.for_keyword(name) for name in SEARCH_ATTRIBUTES],
        dev_server_existing_path=temporal_binary(),
        dev_server_extra_args=[*server_config(), *dynamic_config_flags({"frontend.WorkflowTimeSkippingEnabled": True})],
    ) as environment:
        yield environment


@pytest_asyncio.fixture
async def slow_platform(
    skipping_env: WorkflowEnvironment, task_store: TaskStore, tmp_path: Path, credits_profile: CreditsProfile
) -> AsyncIterator[Platform]:
    """A platform at contract speed, whose time passes only by `pass_time`."""
    running = running_platform(skipping_env, task_store, tmp_path, speed=1.0, credits_profile=credits_profile)
    async with running as platform, platform.worker():
        yield platform


@pytest_asyncio.fixture(scope="session")
async def _quick_platform(
    temporal_env: WorkflowEnvironment,
    task_store: TaskStore,
    tmp_path_factory: pytest.TempPathFactory,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    folder = tmp_path_factory.mktemp("quick-platform")
    running = running_platform(temporal_env, task_store, folder, speed=2_000, credits_profile=credits_profile)
    async with running as platform, platform.worker():
        yield platform


@pytest_asyncio.fixture(scope="session")
async def _patient_platform(
    skipping_env: WorkflowEnvironment,
    task_store: TaskStore,
    tmp_path_factory: pytest.TempPathFactory,
    credits_profile: CreditsProfile,
) -> AsyncIterator[Platform]:
    folder = tmp_path_factory.mktemp("patient-platform")
    running = running_platform(skipping_env, task_store, folder, speed=1.0, credits_profile=credits_profile)
    async with running as platform, platform.worker():
        yield platform


@pytest_asyncio.fixture
async def quick_platform(_quick_platform: Platform) -> AsyncIterator[Platform]:
    """A platform on the wall clock that many scenarios share; an image takes a quarter of a second.

    Its deadlines are too far away to matter. Faults name their task or their payer; remaining faults
    and the policy are reset afterwards.
    """
    _quick_platform.policy = {"deadline_factor": 1_000.0}
    yield _quick_platform
    await _quick_platform.simulators.admin.remove_faults()


@pytest_asyncio.fixture
async def patient_platform(_patient_platform: Platform) -> AsyncIterator[Platform]:
    """A platform at contract speed that many scenarios share; time passes only by `pass_time`."""
    _patient_platform.policy = {}
    yield _patient_platform
    await _patient_platform.simulators.admin.remove_faults()
