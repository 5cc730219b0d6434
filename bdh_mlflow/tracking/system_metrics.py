"""Use of CPU, memory, disk, network and GPU while training runs, sampled with MLflow's own monitors."""

import contextlib
import importlib.util
import threading
import time
from collections.abc import Callable
from typing import Any

SAMPLE_INTERVAL_S = 10.0  # MLflow's own default interval


class SystemMetrics:
    """Samples CPU, memory, disk, network and GPU use with MLflow's own monitors until closed.

    MLflow's own thread makes requests and ends with the first that fails; here samples go to `log`, which is the journal.
    started_at: Unix time that `step`, the number of the sample, is counted from, so that a later process goes on counting.
    group: what the metrics are called, `system/...` or `system/<node>/...`.   others: gives the last sample of other nodes.   monitors:
    of `load_monitors`; loaded with the first sample if not given.
    """

    def __init__(
        self,
        log: Callable[[dict[str, float], int], object],
        started_at: float,
        *,
        interval_s: float = SAMPLE_INTERVAL_S,
        group: str = "system",
        others: Callable[[], dict[str, float]] = dict,
        monitors: list[Any] | None = None,
    ) -> None:
        self._monitors = monitors
        self._log, self._started_at, self._interval_s = log, started_at, interval_s
        self._group, self._others = group, others
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take a last sample and stop."""
        self._closing.set()
        self._thread.join()

    def _sample(self) -> None:
        monitors = self._monitors
        while True:
            last = self._closing.wait(self._interval_s)
            if monitors is None:
                try:
                    monitors = load_monitors()  # not before the first sample: MLflow takes a second to import
                except Exception:
                    if last:  # a program that ends imports nothing more
                        return
                    raise
            values: dict[str, float] = {}
            for monitor in list(monitors):
                try:
                    monitor.collect_metrics()
                    values |= {f"{self._group}/{key}": float(value) for key, value in monitor.aggregate_metrics().items()}
                    monitor.clear_metrics()
                except Exception:  # a driver or sensor that has gone: its curves end, training does not
                    monitors.remove(monitor)
            if values := {**values, **self._others()}:
                self._log(values, int((time.time() - self._started_at) / self._interval_s))
            if last:
                return


def why_unavailable() -> str | None:
    """Why this machine cannot be sampled, None if it can."""
    return None if importlib.util.find_spec("psutil") else "psutil is not installed: pip install psutil"


def load_monitors() -> list[Any]:
    """MLflow's monitors that work here. Takes a second, in which Python has little time for other threads."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no nvidia-ml-py, no driver, no network counters: each fails in its own way
            monitors.append(kind())
    return monitors
