"""Training speed of the layer's forms: `python benchmarks/layer.py [--config configs/config.yaml] [--device cuda]`.

Forward and backward pass of the network (no optimizer) on random bytes with the configuration's own dropout and 4-bit weights, and once
more without dropout, the cases alternating in one process; medians. Each case is given in tokens a second, as a ratio to the blocked form
in the same dtype, and as MFU: useful FLOPs (`bdh.useful_flops`) over the fastest matrix product of the same dtype in this process, measured
in every round. `--lengths` adds the blocked form at longer sequences with as many tokens a batch. `--profile` prints the share of the time
that each operation of a step of the first form takes.
`--curves` trains quickstart's network 100 steps in both forms and prints the largest difference of the losses, in float64, and in float32
beside the difference that another number of threads makes. `--memory` trains two steps of the configuration in a process for each length,
with as many tokens a batch, and prints the peak resident memory.
"""

import argparse
import dataclasses
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bdh_mlflow.config import Config, resolve
from bdh_mlflow.model import bdh, precision
from bdh_mlflow.model.bdh import BDH, useful_flops
from bdh_mlflow.model.fourbit import FourBitView
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.training.optim import LearningRate, build_optimizer


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/config.yaml")
    options.add_argument("--device", default="cpu")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--batch", type=int, help="of the blocked form, instead of the configuration's")
    options.add_argument("--batches", type=int, nargs="*", default=[1, 2], help="of the reference form; the best counts")
    options.add_argument("--dropouts", type=float, nargs="*", help="default: the configuration's, and 0")
    options.add_argument("--profile", action="store_true")
    options.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options.add_argument("--forms", nargs="*", default=["blocked", "reference", "reference compiled"])
    options.add_argument("--lengths", type=int, nargs="*", default=[])
    options.add_argument("--curves", action="store_true")
    options.add_argument("--memory", type=int, nargs="*", default=[], metavar="T")
    options.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    config = Config.from_yaml(given.config)
    if given.peak:
        peak_memory(config, *given.peak)
        return
    if given.forms:
        speeds(config, given)
    if given.curves:
        curves()
    for tokens in given.memory:
        rows = max(1, max(given.memory) // tokens, config.training.batch_size * config.training.block_size // tokens)
        subprocess.run([sys.executable, __file__, "--config", given.config, "--peak", str(rows), str(tokens)], check=True)


class Case(NamedTuple):
    """What is timed.   form: as `BDH.use` takes it, and " compiled"."""

    form: str
    dtype: str
    dropout: float
    rows: int
    tokens: int


class Bench:
    """One network, computed in all the ways of the cases."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.shape = config.to_bdh_config()
        self.network = BDH(self.shape).to(device)
        self._used = ""

    def step(self, case: Case) -> float:
        """Seconds of a forward and backward pass, the preparation of weights included as after an update."""
        network = self.network
        if case.form != self._used:
            self._used = case.form
            network.use(case.form.split()[0], case.form.endswith("compiled"))  # type: ignore[arg-type]
        network.config = dataclasses.replace(self.shape, dropout=case.dropout)
        settings = dataclasses.replace(self.config.low_precision, compute_dtype=case.dtype, use_fp8=False)  # type: ignore[arg-type]
        runs = Precision(self.device, settings)
        runs.prepare(network, bdh.PROJECTIONS)
        if isinstance(network.weight_view, FourBitView):
            network.weight_view.invalidate()
        idx = torch.randint(0, 256, (case.rows, case.tokens + 1), device=self.device)
        synchronize(self.device)
        started = time.perf_counter()
        with runs.autocast():
            _, loss = network(idx[:, :-1], idx[:, 1:])
        loss.backward()
        synchronize(self.device)
        took = time.perf_counter() - started
        network.zero_grad()
        return took


def speeds(config: Config, given: argparse.Namespace) -> None:
    bench = Bench(config, torch.device(given.device))
    tokens, batch = config.training.block_size, given.batch or config.training.batch_size
    own = dict.fromkeys([config.model.dropout, 0.0] if given.dropouts is None else given.dropouts)
    cases: list[Case] = []
    for name in given.dtypes:
        for dropout in own:
            for form in given.forms:
                cases += [Case(form, name, dropout, b, tokens) for b in (given.batches if form.startswith("reference") else [batch])]
        cases += [Case("blocked", name, config.model.dropout, max(1, batch * tokens // length), length) for length in given.lengths]
    times: dict[Case, list[float]] = {case: [] for case in cases}
    peaks = dict.fromkeys(given.dtypes, 0.0)
    for number in range(given.rounds + 1):  # the first warms up, and compiles
        for name in given.dtypes:
            peaks[name] = max(peaks[name], precision.gemm_peak.__wrapped__(getattr(torch, name), bench.device))
        for case in cases:
            seconds = bench.step(case)
            if number:
                times[case].append(seconds)
    print(", ".join(f"{name} matrix product {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()), flush=True)
    speed = {case: case.rows * case.tokens / statistics.median(took) for case, took in times.items()}

    def blocked_like(case: Case) -> float:
        alike = (c for c in cases if c.form == "blocked" and (c.dtype, c.dropout, c.tokens) == (case.dtype, case.dropout, tokens))
        return max((speed[c] for c in alike), default=math.nan)

    print(f"{'form':20} {'dtype':9} {'dropout':>7} {'B x T':>9} {'tokens/s':>9} {'MFU %':>6} {'blocked / it':>13}")
    for case in cases:
        form, name, dropout, rows, length = case
        mfu, ratio = 100 * speed[case] * useful_flops(bench.shape, length) / peaks[name], blocked_like(case) / speed[case]
        print(f"{form:20} {name:9} {dropout:7} {f'{rows} x {length}':>9} {speed[case]:9.1f} {mfu:6.1f} {ratio:13.2f}")
    if given.profile:
        for name in given.dtypes:
            profile(bench, next(case for case in cases if case.dtype == name))


def profile(bench: Bench, case: Case) -> None:
    """The share of a step that each operation takes; what Python and the passes in C++ take is that of the two functions of `blocked`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        took_s = bench.step(case)
    own = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    print(f"one step of {case.form}, {case.dtype}, dropout {case.dropout}: {took_s:.1f} s")
    for event in own[:12]:
        print(f"  {event.key[:40]:40} {event.self_cpu_time_total / 1e4 / took_s:5.1f} %  {event.count:6} calls")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def curves(steps: int = 100) -> None:
    """Quickstart's training, with its schedule, clipping and seed, on the sources of this package."""
    config = resolve(Config.from_yaml("configs/quickstart.yaml")).config
    text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in sorted(Path("bdh_mlflow").rglob("*.py")))), dtype=torch.uint8)
    reference, blocked, alone = (losses(config, text, steps, *how) for how in (("reference", 0), ("blocked", 0), ("reference", 1)))
    exact = [losses(config, text, steps, form, 0, torch.float64) for form in ("reference", "blocked")]

    def difference(one: list[float], other: list[float]) -> float:
        return max(abs(a - b) for a, b in zip(one, other, strict=True))

    print(f"quickstart, {steps} steps, loss {blocked[0]:.4f} to {blocked[-1]:.4f}; largest difference of losses:")
    print(f"  blocked from reference {difference(*exact):.1e} in float64, {difference(reference, blocked):.1e} in float32")
    print(f"  reference from reference on one thread {difference(reference, alone):.1e} in float32")


def losses(config: Config, text: torch.Tensor, steps: int, form: str, threads: int, dtype: torch.dtype = torch.float32) -> list[float]:
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or usual)
    torch.manual_seed(config.training.seed)
    network = BDH(config.to_bdh_config()).to(dtype)
    network.use(form)  # type: ignore[arg-type]
    optimizer = build_optimizer(network.parameters(), config.training)
    schedule = LearningRate(config.training.learning_rate, config.scheduler)
    batch, tokens, found = config.training.batch_size, config.training.block_size, []
    for number in range(steps):
        idx = torch.stack([text[s : s + tokens + 1] for s in torch.randint(0, len(text) - tokens - 1, (batch,))]).long()
        _, loss = network(idx[:, :-1], idx[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.training.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(number)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    torch.set_num_threads(usual)
    return found


def peak_memory(config: Config, rows: int, tokens: int) -> None:
    """Two training steps; prints the peak resident memory of this process."""
    device = torch.device("cpu")
    runs = Precision(device, config.low_precision)
    network = BDH(config.to_bdh_config())
    network.use("blocked")
    optimizer = build_optimizer(network.parameters(), config.training)
    runs.prepare(network, bdh.PROJECTIONS, optimizer)
    forward: Callable[..., Any] = network
    for shape in ((1, 64), (rows, tokens)):  # the first makes the optimizer's states
        idx = torch.randint(0, 256, (shape[0], shape[1] + 1))
        with runs.autocast():
            _, loss = forward(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{rows} x {tokens} tokens, {config.low_precision.compute_dtype}: peak resident memory {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
