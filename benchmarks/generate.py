"""Cost of a generated token: `python benchmarks/generate.py [--config configs/config.yaml] [--contexts 64 1024 8192] [--against 1024]`.

Milliseconds a token with the recurrent state, after prompts of several lengths (median over the tokens), and for a token computed as the
published code does, by a forward pass over the whole prefix in the reference form. Weights are a checkpoint's (`--run`) or random: the cost
depends on the share of active neurons, which is printed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bdh_mlflow.config import Config, TrackingConfig
from bdh_mlflow.inference import load
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.sampling import Sampler


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/config.yaml")
    options.add_argument("--run", help="target of `resume`, instead of random weights")
    options.add_argument("--contexts", type=int, nargs="*", default=[64, 1024, 8192])
    options.add_argument("--against", type=int, default=1024, help="context for the pass over the whole prefix")
    options.add_argument("--tokens", type=int, default=24)
    given = options.parse_args()
    torch.manual_seed(0)
    network = (
        load.load(given.run, Path("checkpoints"), TrackingConfig()).model
        if given.run
        else BDH(Config.from_yaml(given.config).to_bdh_config())
    )
    network.eval()
    text = torch.randint(0, 256, (1, max([*given.contexts, given.against])), device=network.embed.weight.device)
    with torch.no_grad(), network.observed() as facts:
        network(text[:, :256])
    active = [share for name, share in facts.items() if name.startswith("bdh/active_x_")]
    print(f"active neurons: {100 * statistics.mean(active):.0f} %")
    streams = {}
    for context in given.contexts:
        started = time.perf_counter()
        streams[context] = network.stream(text[:, :context], given.tokens + 1, Sampler(temperature=0))
        next(streams[context])
        print(f"context {context}: prompt read in {time.perf_counter() - started:.2f} s", flush=True)
    times: dict[int, list[float]] = {context: [] for context in streams}
    for _ in range(given.tokens):  # alternating
        for context, stream in streams.items():
            started = time.perf_counter()
            next(stream)
            times[context].append(1e3 * (time.perf_counter() - started))
    cost = {context: statistics.median(taken) for context, taken in times.items()}
    shortest = min(cost)
    for context, ms in cost.items():
        print(f"context {context}: {ms:.1f} ms a token, {ms / cost[shortest]:.2f} of that at {shortest}")
    network.use("reference")
    again = []
    with torch.no_grad():
        for _ in range(3):
            started = time.perf_counter()
            network(text[:, : given.against])
            again.append(1e3 * (time.perf_counter() - started))
    prefix_ms, nearest = statistics.median(again), min(cost, key=lambda context: abs(context - given.against))
    print(f"pass over a prefix of {given.against}: {prefix_ms:.0f} ms a token, {prefix_ms / cost[nearest]:.0f} times the cost with a state")


if __name__ == "__main__":
    main()
