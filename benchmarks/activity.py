"""What counting active neurons adds to an evaluation: `python benchmarks/activity.py [--config configs/quickstart.yaml] [--rounds 15]`.

Evaluations of the same batches with and without it, alternating; the median of the paired ratios, with its quartiles.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bdh_mlflow.config import Config
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.training.evaluate import Evaluator


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/quickstart.yaml")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--batches", type=int, default=4)
    given = options.parse_args()
    config = Config.from_yaml(given.config)
    torch.manual_seed(0)
    network = BDH(config.to_bdh_config())
    shape = (config.training.batch_size, config.training.block_size + 1)
    batches = [torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(given.batches)]

    def seconds(observed: bool) -> float:
        started = time.perf_counter()
        with network.observed() if observed else nullcontext():
            Evaluator(model=network, autocast=nullcontext, device=torch.device("cpu")).loss(batches)
        return time.perf_counter() - started

    seconds(True)
    ratios = []
    for number in range(given.rounds):  # which comes first alternates
        first = seconds(number % 2 == 0)
        second = seconds(number % 2 == 1)
        ratios.append(first / second if number % 2 == 0 else second / first)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{given.config}: evaluation with / without: {middle:.4f} (quartiles {low:.4f} {high:.4f})")


if __name__ == "__main__":
    main()
