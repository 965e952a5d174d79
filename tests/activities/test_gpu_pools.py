"""Which of ComfyUI's GPU pools a workflow gets to see: few, and among them those that decide (contract §2)."""

from __future__ import annotations

import pytest

from activities.comfyui import deciding_pools
from comfyui_temporal.contracts.comfyui import GpuPool
from comfyui_temporal.contracts.size_budget import MAX_POOLS


def pool(gpu_type: str, total: int, wait: float = 0) -> GpuPool:
    """`wait` tells pools of one type apart."""
    return GpuPool(gpu_type=gpu_type, total=total, available=0, accelerated_wait=wait)


@pytest.mark.parametrize(
    ("pools", "gpu_type", "deciding"),
    [
        pytest.param([], None, [], id="no pool"),
        pytest.param([pool("a", 2)], "b", [], id="another type"),
        pytest.param([pool("a", 2), pool("b", 0)], "b", [pool("b", 0)], id="the requested type without GPUs"),
        pytest.param([pool("a", 0), pool("b", 2)], "b", [pool("b", 2)], id="the requested type"),
        pytest.param([pool("a", 1, 1), pool("a", 1, 2)], "a", [pool("a", 1, 1)], id="the first that has GPUs"),
        pytest.param([pool("a", 0, 1), pool("a", 0, 2)], "a", [pool("a", 0, 1)], id="the first of empty ones"),
        pytest.param([pool("a", 0), pool("a", 1)], "a", [pool("a", 1)], id="one GPU is better than none"),
        pytest.param([pool("a", 1), pool("a", 0)], "a", [pool("a", 1)], id="none is not better than one"),
        pytest.param(
            [pool("a", 0), pool("b", 1), pool("c", 0), pool("d", 2)],
            None,
            [pool("b", 1), pool("d", 2), pool("a", 0), pool("c", 0)],
            id="any type: those with GPUs first",
        ),
    ],
)
def test_one_pool_of_each_type_decides_and_one_with_gpus_where_there_is_any(
    pools: list[GpuPool], gpu_type: str | None, deciding: list[GpuPool]
) -> None:
    assert deciding_pools(pools, gpu_type) == deciding


@pytest.mark.parametrize("gpu_type", [None, "last"])
def test_a_type_with_gpus_is_seen_at_the_end_of_a_long_list(gpu_type: str | None) -> None:
    listed = [pool(f"empty-{number}", 0) for number in range(MAX_POOLS * 3)] + [pool("last", 1)]
    deciding = deciding_pools(listed, gpu_type)
    assert len(deciding) <= MAX_POOLS
    assert deciding[0] == pool("last", 1)
