"""Samples of the machine go on whatever a driver does."""

import time

import pytest
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from bdh_mlflow.tracking.system_metrics import SystemMetrics


def test_samples_go_on_when_one_monitor_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(monitor: NetworkMonitor) -> None:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(NetworkMonitor, "collect_metrics", broken)
    received: list[tuple[dict[str, float], int]] = []
    samples = SystemMetrics(lambda values, step: received.append((values, step)), time.time() - 1.0, interval_s=0.05)
    while len(received) < 2:
        time.sleep(0.01)
    samples.close()
    assert all({"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= values.keys() for values, _ in received)
    assert not any(key.startswith("system/network") for values, _ in received for key in values)
    steps = [step for _, step in received]
    assert steps == sorted(steps)
    assert steps[0] >= 20  # counted from the start of the run, a second ago
