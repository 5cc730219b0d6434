"""The GPU page: `python benchmarks/gpu.py [--config configs/config.yaml] [--minutes 10]`, everything that is to be known of one card.

Prints one Markdown table for docs/measurements.md, headed by the card's name: the tests marked gpu; training steps (forward, backward,
AdamW) of both forms of the layer in each dtype, recomputed or not, compiled or not; memory at several batches and lengths; generation; FP8
by Transformer Engine where it can be imported. Then what the figures say of `training.layer_form: auto`. Each row runs in a process of its
own, so that one that fails, runs out of memory or crashes the driver's context costs itself alone, and says why; rows for which no time is
left say so. `--device cpu --toy` runs every row at toy sizes, so that a test can.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from bdh_mlflow.config import Config
from bdh_mlflow.model import bdh, fp8, precision
from bdh_mlflow.model.bdh import BDH, useful_flops
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.training.optim import build_optimizer

HERE = Path(__file__).parent.parent
WARM_UPS, STEPS, GENERATED = 2, 5, 32
ROW_S = 120.0
TOY = {
    "model.n_layer": 2,
    "model.n_embd": 32,
    "model.n_head": 2,
    "model.mlp_internal_dim_multiplier": 4,
    "training.block_size": 32,
    "training.batch_size": 2,
}


@dataclass(frozen=True)
class Row:
    """One measurement.   kind: which function of `KINDS` makes it.   settings: of the configuration.   decides: the verdict goes by it."""

    what: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    form: str = "reference"
    compiled: bool = False
    recompute: bool = False
    context: int = 0
    decides: bool = False

    @property
    def command(self) -> str:
        """What identifies the row for a reader of the table."""
        words = [f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items()]
        words += [self.form] * (self.kind == "training") + ["compiled"] * self.compiled + ["recomputed"] * self.recompute
        return ", ".join([self.what, *words])


def rows(config: Config, toy: bool) -> Iterator[Row]:
    """What is measured, the most important first.   toy: one dtype, and little of what has to be compiled."""
    batch, tokens = config.training.batch_size, config.training.block_size
    for dtype in ("bfloat16",) if toy else ("bfloat16", "float32", "float16"):
        settings = {"low_precision.compute_dtype": dtype}
        for form, compiled, recompute in (
            ("reference", True, False),
            ("blocked", True, False),
            ("blocked", False, False),
            ("reference", False, False),
            ("reference", True, True),
            ("reference", False, True),
        ):
            if toy and form == "reference" and compiled and recompute:
                continue
            decides = compiled and not recompute and dtype == config.low_precision.compute_dtype
            yield Row("training", "training", settings, form, compiled, recompute, decides=decides)
    if reason := fp8.why_unavailable(precision.pick_device()):
        yield Row(f"FP8 by Transformer Engine {reason}", "nothing")
    else:
        for recipe in ("hybrid", "e4m3"):
            yield Row("FP8 by Transformer Engine", "training", {"low_precision.use_fp8": True, "fp8.format": recipe})
    for rows_, length in ((4 * batch, tokens), (batch, 4 * tokens), (1, 16 * tokens)):
        sizes = {"training.batch_size": rows_, "training.block_size": length}
        for form in ("blocked",) if toy else ("blocked", "reference"):
            yield Row("memory", "training", sizes, form, compiled=True)
    for context in (tokens // 8, 2 * tokens):
        yield Row(f"generation after {context} bytes", "generation", context=context)


def training(row: Row, config: Config, device: torch.device) -> str:
    """Tokens a second, MFU and peak memory of whole steps."""
    torch.manual_seed(0)
    runs = Precision.from_config(config, device)
    network = BDH(config.to_bdh_config()).to(device)
    network.recompute = row.recompute
    network.use(row.form, row.compiled)  # type: ignore[arg-type]
    optimizer = build_optimizer(network.parameters(), config.training)
    runs.prepare(network, bdh.PROJECTIONS, optimizer)
    scaler, sizes = runs.scaler(), (config.training.batch_size, config.training.block_size)
    times = []
    for number in range(WARM_UPS + STEPS):
        if number == WARM_UPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        idx = torch.randint(0, 256, (sizes[0], sizes[1] + 1), device=device)
        started = clock(device)
        with runs.autocast():
            _, loss = network(idx[:, :-1], idx[:, 1:])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        times.append(clock(device) - started)
    speed = sizes[0] * sizes[1] / statistics.median(times[WARM_UPS:])
    memory = f", {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB" if device.type == "cuda" else ""
    mfu = 100 * speed * useful_flops(network.config, sizes[1]) / precision.gemm_peak(runs.dtype, device)
    return f"{speed:,.0f} tokens/s, MFU {mfu:.1f} %{memory}"


def generation(row: Row, config: Config, device: torch.device) -> str:
    """Milliseconds a byte with the recurrent state."""
    torch.manual_seed(0)
    network = BDH(config.to_bdh_config()).to(device).eval()
    prompt = torch.randint(0, 256, (1, row.context), device=device)
    started, times = clock(device), []
    for _ in network.stream(prompt, GENERATED + 1, Sampler(temperature=0)):
        now = clock(device)
        times.append(now - started)
        started = now
    return f"{1e3 * statistics.median(times[1:]):.2f} ms a byte; the prompt {1e3 * times[0]:.0f} ms"


KINDS: dict[str, Callable[[Row, Config, torch.device], str]] = {
    "training": training,
    "generation": generation,
    "nothing": lambda row, config, device: "not run",
}


def clock(device: torch.device) -> float:
    """Seconds, with everything on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default=str(HERE / "configs" / "config.yaml"))
    options.add_argument("--device", default="cuda")
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--toy", action="store_true", help="a tiny network, for tests")
    options.add_argument("--skip-tests", action="store_true", help="do not run the tests marked gpu")
    options.add_argument("--row", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here (torch.cuda.is_available() is false); nothing was measured", file=sys.stderr)
        sys.exit(2)
    device = torch.device(given.device)
    config = Config.from_yaml(given.config).replaced(TOY if given.toy else {})
    if given.row:
        row = Row(**json.loads(given.row))
        print(json.dumps(KINDS[row.kind](row, config.replaced(row.settings), device)))
        return
    deadline = time.monotonic() + 60 * given.minutes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, as a stand-in"
    print(f"{name}, torch {torch.__version__}: `python benchmarks/gpu.py`\n\n| what | figure |\n| --- | --- |", flush=True)
    if not given.skip_tests:
        line("tests marked gpu", tests(deadline))
    found: dict[str, float] = {}
    for row in rows(config, given.toy):
        figure = measured(row, given, deadline)
        line(row.command, figure)
        if row.decides and " tokens/s" in figure:
            found[row.form] = float(figure.partition(" tokens")[0].replace(",", ""))
    print(f"\n{verdict(found)}")


def line(what: str, figure: str) -> None:
    """A row of the table, at once: a card may be taken away."""
    print(f"| {what} | {figure.replace('|', '/')} |", flush=True)


def measured(row: Row, given: argparse.Namespace, deadline: float) -> str:
    """The figure of a row, or why there is none."""
    left = deadline - time.monotonic()
    if left < 5:
        return "not run: no time left"
    command = [sys.executable, __file__, "--config", given.config, "--device", given.device, "--row", json.dumps(dataclasses.asdict(row))]
    return figure_of([*command, *["--toy"] * given.toy], min(left, ROW_S), lambda output: str(json.loads(output[-1])))


def tests(deadline: float) -> str:
    """The last line of the tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "gpu", "-p", "no:cacheprovider", str(HERE / "tests")]
    return figure_of(command, deadline - time.monotonic(), lambda output: output[-1].strip("= "), accepted=(0, 1, 5))


def figure_of(command: list[str], timeout_s: float, read: Callable[[list[str]], str], accepted: tuple[int, ...] = (0,)) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=HERE)
    except subprocess.TimeoutExpired:
        return f"failed: not done after {timeout_s:.0f} s"
    output, errors = done.stdout.strip().splitlines(), done.stderr.strip().splitlines()
    if done.returncode not in accepted or not output:
        return f"failed: {(errors or output or [f'exit code {done.returncode}'])[-1][:200]}"
    return read(output)


def verdict(found: dict[str, float]) -> str:
    """What the compiled forms in the configuration's dtype say of the default, which is the reference form on CUDA."""
    if len(found) < 2:
        return "No verdict on `training.layer_form: auto`: one of the forms has no figure."
    ratio = found["blocked"] / found["reference"]
    better = "stays the reference form" if ratio < 1 else "should become blocked"
    return f"Blocked is {ratio:.2f} times as fast as reference, both compiled: on this card `training.layer_form: auto` {better}."


if __name__ == "__main__":
    main()
