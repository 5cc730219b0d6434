"""What each number format does to a training run: `python benchmarks/precision.py [--steps 700] [--seeds 3] [--cases ...] [--share]`.

Quickstart's network and data, equal steps and seeds, one `bdh-mlflow train` process after the other. Printed, as means over the seeds:
final val/loss on 64 batches, its difference from float32's with the same seed and the standard error of that mean, bytes of optimizer state
a parameter and of exported weights, and the median step time against float32's. Any rounding changes the trajectory: `float32 nudged` is
float32 at a learning rate higher by a factor of 1.00001, so its difference is what chance alone makes.
`after` is float32's last checkpoint rounded to 4 bits after the training, on the same validation batches.
`--share` times 4-bit quantisation against a training step of the default configuration (minutes).
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config, TrackingConfig, resolve
from bdh_mlflow.inference import export, load
from bdh_mlflow.model import fourbit, precision
from bdh_mlflow.model.bdh import BDH, PROJECTIONS
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.training import optim
from bdh_mlflow.vocabulary import BYTES

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = str(CONFIGS / "quickstart.yaml")
VALIDATION_BATCHES = 64
PLAIN = ("low_precision.use_4bit=false", "low_precision.compute_dtype=float32")
FOUR = ("low_precision.use_4bit=true", "low_precision.compute_dtype=float32")
FP8 = (*PLAIN, "low_precision.use_fp8=true", "fp8.emulate=true")
CASES: dict[str, tuple[str, ...]] = {
    "float32": PLAIN,
    "bfloat16": (*PLAIN, "low_precision.compute_dtype=bfloat16"),
    "float16": (*PLAIN, "low_precision.compute_dtype=float16"),
    "nf4": (*FOUR, "low_precision.use_double_quant=false"),
    "nf4 nested": FOUR,
    "fp4": (*FOUR, "low_precision.quantization_type=fp4", "low_precision.use_double_quant=false"),
    "fp4 nested": (*FOUR, "low_precision.quantization_type=fp4"),
    "8-bit AdamW": (*PLAIN, "low_precision.optimizer_bits=8"),
    "4-bit AdamW": (*PLAIN, "low_precision.optimizer_bits=4"),
    "fp8 hybrid": FP8,
    "fp8 e4m3": (*FP8, "fp8.format=e4m3"),
    "float32 nudged": (*PLAIN, f"training.learning_rate={1.00001 * Config.from_yaml(QUICKSTART).training.learning_rate}"),
}


class Result(NamedTuple):
    """Of one run.   state_bytes: optimizer state a parameter.   weight_bytes: size of the exported file.   last: its checkpoint."""

    val_loss: float
    step_ms: float
    state_bytes: float
    weight_bytes: int
    last: Path


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=700)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options.add_argument("--share", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given.cases = list(dict.fromkeys(["float32", *given.cases])) if given.cases else []
        if given.cases:
            losses(given.cases, given.steps, given.seeds, Path(folder))
    if given.share:
        share()


def losses(cases: list[str], steps: int, seeds: int, folder: Path) -> None:
    print(f"{'':16} {'val/loss':>9} {'to float32, %':>16} {'state B/param':>13} {'weights MB':>10} {'step ms':>8} {'ratio':>6}")
    plain: list[Result] = []
    for case in cases:
        done = [trained(case, steps, seed, folder / f"{case.replace(' ', '_')}_{seed}") for seed in range(seeds)]
        plain = plain or done
        step_ms, first = (statistics.mean(r.step_ms for r in results) for results in (done, plain))
        print(
            f"{line(case, [r.val_loss for r in done], [r.val_loss for r in plain])} {done[0].state_bytes:13.3f} "
            f"{done[0].weight_bytes / 1e6:10.3f} {step_ms:8.1f} {step_ms / first:6.2f}",
            flush=True,
        )
        if case == "float32":
            for kind, nested in (("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)):
                after = [rounded_after(r.last, kind, nested) for r in done]
                print(line(f"  after {kind}{' nested' if nested else ''}", after, [r.val_loss for r in done]), flush=True)


def line(name: str, values: list[float], plain: list[float]) -> str:
    """Mean, and mean difference from float32's in percent with its standard error."""
    percent = [100 * (value / p - 1) for value, p in zip(values, plain, strict=True)]
    error = statistics.stdev(percent) / len(percent) ** 0.5 if len(percent) > 1 else float("nan")
    return f"{name:18} {statistics.mean(values):7.4f} {statistics.mean(percent):+8.2f} +- {error:4.2f}"


def trained(case: str, steps: int, seed: int, folder: Path) -> Result:
    folder.mkdir(parents=True)
    uri = f"sqlite:///{folder}/mlflow.db"
    settings = [
        *CASES[case],
        f"training.seed={seed}",
        f"training.max_iters={steps}",
        f"scheduler.decay_steps={steps}",
        f"training.test_freq={steps}",
        f"training.test_iters={VALIDATION_BATCHES}",
        f"training.checkpoint_freq={steps}",
        "training.log_freq=20",
        f"training.checkpoint_dir={folder / 'checkpoints'}",
        f"tracking.tracking_uri={uri}",
        "tracking.log_system_metrics=false",
        "tracking.mirror_checkpoints=false",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", QUICKSTART, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case}: {done.stdout}{done.stderr}")
    (run_dir,) = checkpoint.list_all(folder / "checkpoints")
    saved, _ = checkpoint.newest(run_dir)
    assert isinstance(saved, checkpoint.Checkpoint)
    assert saved.manifest.val_loss is not None
    assert saved.manifest.mlflow_run_id is not None
    points = MlflowClient(uri).get_metric_history(saved.manifest.mlflow_run_id, "perf/step_ms")
    state = checkpoint.load(saved.path)
    weights = state["model_state_dict"]
    kind: Any = "4bit" if state["config"]["low_precision"]["use_4bit"] else "safetensors"
    source = export.Source(weights, state["step"], Config.from_dict(state["config"]), BYTES, saved.manifest.val_loss)
    written = export.write(folder / f"weights{export.SUFFIX}", source, kind)
    each = optim.state_bytes(state["optimizer_state_dict"]) / sum(t.numel() for t in weights.values())
    return Result(saved.manifest.val_loss, statistics.median(p.value for p in points), each, written.bytes, saved.path)


def rounded_after(last: Path, kind: Any, nested: bool) -> float:
    loaded = load.load(str(last), last.parent.parent, TrackingConfig())
    settings = dataclasses.replace(loaded.config.low_precision, use_4bit=True, quantization_type=kind, use_double_quant=nested)
    Precision(loaded.precision.device, settings).prepare(loaded.model, PROJECTIONS)
    return load.validation_loss(loaded, loaded.config.dataset, loaded.config.training.test_iters).loss


def share() -> None:
    """Time 4-bit quantisation and a training step of the default configuration."""
    device = precision.pick_device()
    config = resolve(Config.from_yaml(CONFIGS / "config.yaml"), precision.machine(device)).config
    network, runs = BDH(config.to_bdh_config()).to(device), Precision.from_config(config, device)
    assert config.training.layer_form != "auto"
    network.use(config.training.layer_form)
    optimizer = optim.build_optimizer(network.parameters(), config.training)
    runs.prepare(network, PROJECTIONS, optimizer)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for name in PROJECTIONS:
            fourbit.round_to_4bit(
                getattr(network, name).detach(), config.low_precision.quantization_type, config.low_precision.use_double_quant
            )
        times.append(time.perf_counter() - started)
    quantising_s = statistics.median(times)
    idx = torch.randint(0, 256, (config.training.batch_size, config.training.block_size + 1), device=device)
    started = time.perf_counter()
    with runs.autocast():
        _, loss = network(idx[:, :-1], idx[:, 1:])
    loss.backward()
    optimizer.step()
    step_s = time.perf_counter() - started
    print(
        f"default configuration: 4-bit quantisation {quantising_s:.2f} s of a step of {step_s:.1f} s, {100 * quantising_s / step_s:.1f} %"
    )


if __name__ == "__main__":
    main()
