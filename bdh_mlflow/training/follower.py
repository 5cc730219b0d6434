"""Every rank but 0: computes its share of what rank 0 has decided, until that ends. Imports nothing that tracks a run, and mlflow only for
its monitors of a machine that rank 0 is not on.

`python -m bdh_mlflow.training.follower` is what `processes` starts on this machine.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from bdh_mlflow import host
from bdh_mlflow.config import Config
from bdh_mlflow.distributed import World
from bdh_mlflow.errors import BdhError
from bdh_mlflow.tracking import system_metrics
from bdh_mlflow.tracking.tracker import NullTracker
from bdh_mlflow.training import nodes, processes
from bdh_mlflow.training.build import build, build_trainer
from bdh_mlflow.training.origin import Settled
from bdh_mlflow.training.parts import Ending
from bdh_mlflow.training.silent import SILENT
from bdh_mlflow.training.stop import StopRequest


def follow(world: World, stop: StopRequest, parquet_dir: str | None = None) -> Ending:
    """Train with rank 0, which decides, tracks and saves, until it ends.   Raises a BdhError where this or another rank fails.

    parquet_dir: where this machine has the text; None where rank 0 has it.
    """
    stop.begun = True  # rank 0 knows whether there is something to save
    with world.failing():
        settled: Settled = world.share(_decided_by_rank_0)
        if parquet_dir is not None:
            settled = dataclasses.replace(settled, config=settled.config.replaced({"dataset.parquet_dir": parquet_dir}))
        trainer = build_trainer(build(settled, SILENT, world), SILENT, NullTracker(), SILENT, stop)
        with _sampled(settled.config, world):
            world.expect_updates()
            host.loaded()
            return trainer.run()


@contextlib.contextmanager
def _sampled(config: Config, world: World) -> Iterator[None]:
    """The first rank of a machine other than rank 0's tells how that is used."""
    if not (config.tracking.log_system_metrics and world.leads_node()) or system_metrics.why_unavailable():
        yield
        return
    samples = nodes.sampled(world, NullTracker().metrics, 0.0)
    try:
        yield
    finally:
        samples.close()


def _decided_by_rank_0() -> Settled:
    raise AssertionError("only rank 0 makes what is shared")


def main(arguments: list[str]) -> int:
    """The exit code, which nobody but a reader of a process list sees: rank 0 says what happened."""
    folder, rank, size, patience_s = arguments
    processes.end_with_parent()
    stop = StopRequest()
    stop.install()
    try:
        follow(processes.meet(Path(folder), int(rank), int(size), float(patience_s)), stop)
    except BdhError as error:
        if getattr(error, "speaks", False):
            print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    host.leave(main(sys.argv[1:]))
