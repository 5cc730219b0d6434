"""Use of the machines of a training: rank 0 samples its own and logs what the first rank of each other one posts."""

import json
import re
from collections.abc import Callable

from bdh_mlflow.distributed import World
from bdh_mlflow.tracking.system_metrics import SystemMetrics


def sampled(world: World, log: Callable[[dict[str, float], int], object], started_at: float) -> SystemMetrics:
    """Samples until closed.   log: of rank 0.   started_at: see `SystemMetrics`; of no meaning elsewhere."""
    if world.rank:
        return SystemMetrics(lambda values, step: world.post(json.dumps(values)), started_at, group=_group(world))
    return SystemMetrics(log, started_at, group=_group(world), others=lambda: _posted(world))


def _group(world: World) -> str:
    """`system` where there is one machine, `system/<node>` where there are several."""
    if len(set(world.hosts)) == 1:
        return "system"
    return f"system/{re.sub(r'[^A-Za-z0-9_.-]', '_', world.hosts[world.rank]) or 'node'}"


def _posted(world: World) -> dict[str, float]:
    values: dict[str, float] = {}
    for text in world.posts().values():
        values |= json.loads(text)
    return values
