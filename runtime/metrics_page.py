"""The metrics page of a process that runs a Temporal worker: the SDK's own metrics, and what we count beside them.

Names are as Temporal documents them for Prometheus: counters end in `_total`, times are in seconds
(https://docs.temporal.io/references/sdk-metrics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from temporalio.runtime import PrometheusConfig, Runtime, TelemetryConfig


def metrics_runtime(
    host: str, port: int | None, *, setting: str, buckets: Mapping[str, Sequence[float]] | None = None
) -> Runtime | None:
    """A runtime for this process's client that serves `/metrics`; None without a port.

    `buckets` are those of our histograms, by name. Raises ValueError with a sentence if the port is taken.
    """
    if port is None:
        return None
    address = f"{host}:{port}"
    page = PrometheusConfig(
        bind_address=address,
        counters_total_suffix=True,
        unit_suffix=True,
        durations_as_seconds=True,
        histogram_bucket_overrides=buckets,
    )
    try:
        return Runtime(telemetry=TelemetryConfig(metrics=page))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The metrics page cannot listen at {address} ({error}): set COMFYUI_TEMPORAL_{setting} to a free port."
        ) from None
