"""Results of arXiv:2509.26507 at the size of two cores: `python benchmarks/paper.py NAME [--folder paper] [--seeds 1] [--steps N]`.

repetition   figure 14: activity falls when a random word is repeated. A model of 1,024 neurons learns texts that do that.
merge        table 2: two forks of one model, each trained on an alphabet of its own, are merged by laying their neurons side by side.
size         figure 7: loss against the number of neurons at fixed D, beside a GPT of as many parameters (torch's own layers).
activity     section 4.1: how many neurons are active, over a training.
detach       section 7.2: training without backpropagation through time, against what bigrams alone would reach.
carry        truncated backpropagation over a coherent text, as the paper trains, beside windows that are read alone.

Data, checkpoints and the MLflow store lie in the folder; what is there already is not made again. Prints what docs/paper.md shows.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdh_mlflow.config import Config
from bdh_mlflow.data import validation
from bdh_mlflow.data.order import Order, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
PLAIN = {"low_precision.use_4bit": "false", "training.log_freq": "100", "tracking.log_system_metrics": "false"}
ROWS = 1000  # documents of a row group
WARM_UP, WORD, TIMES = 13, 8, 8  # as bdh_mlflow/analysis/repetition.py
GREEK = str.maketrans(string.ascii_letters, "αβγδεζηθικλμνξοπρστυφχψωϊϋΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩΪΫ")
CYRILLIC = str.maketrans(string.ascii_letters, "абвгдежзийклмнопрстуфхцчшщАБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩ")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=["repetition", "merge", "size", "activity", "detach", "carry"])
    options.add_argument("--folder", type=Path, default=Path("paper"))
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--steps", type=int, help="of each training; fewer for a quick look")
    given = options.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(given.folder)
    begun = time.perf_counter()
    for line in globals()[given.name](range(1, given.seeds + 1), given.steps):
        print(line, flush=True)
    print(f"took {(time.perf_counter() - begun) / 60:.1f} min")


def repetition(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    words = texts("letters", itertools.islice(_cycles(), 20_000))
    shape = {"n_layer": 4, "n_embd": 32, "n_head": 4, "mlp_internal_dim_multiplier": 32}
    settings = {
        **{f"model.{key}": value for key, value in shape.items()},
        "dataset.parquet_dir": words,
        "training.block_size": 154,
        "training.batch_size": 4,
        "training.learning_rate": 0.003,
        "scheduler.type": "none",
    }
    for seed in seeds:
        run = train(f"repetition-{seed}", {**settings, "training.seed": seed}, steps or 2200)
        yield f"seed {seed}: val/loss {loss_of(run):.3f}, least possible {_floor():.3f}"
        command("analyze", run, "--only", "repetition", "--words", "64", "--out", f"analysis-{seed}")
        (told,) = Path(f"analysis-{seed}/repetition").glob("*.json")
        for table in json.loads(told.read_text())["tables"]:
            yield from ("  ".join(f"{cell:<22}" for cell in row) for row in (table["header"], *table["rows"]))
        yield json.loads(told.read_text())["says"]


def merge(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    plain = python_texts()
    folders = {"Latin": texts("latin", plain), "Greek": texts("greek", (t.translate(GREEK) for t in plain))}
    folders["Cyrillic"] = texts("cyrillic", (t.translate(CYRILLIC) for t in plain))
    data = [word for folder in folders.values() for word in ("--data", folder)]
    for seed in seeds:
        count = steps or 1000
        base = train(f"base-{seed}", {"dataset.parquet_dir": folders["Latin"], "training.seed": seed}, count)
        forks = [
            train(f"{name}-{seed}", {"dataset.parquet_dir": folders[name], "training.seed": seed}, 2 * count, base)
            for name in ("Greek", "Cyrillic")
        ]
        strangers = [
            train(f"stranger-{name}-{seed}", {"dataset.parquet_dir": folders[name], "training.seed": 100 * seed + number}, count)
            for number, name in enumerate(("Greek", "Cyrillic"))
        ]
        merged, alike = _merged(forks)
        collapsed, unlike = _merged(strangers, "--strangers")
        yield f"seed {seed}: forks alike by {alike}, strangers by {unlike}"
        shown = (base, *forks, merged, *strangers, collapsed)
        names = ("base", "fork Greek", "fork Cyrillic", "merged", "stranger Greek", "stranger Cyrillic", "strangers merged")
        table = command("evaluate", *shown, *data, "--no-log")
        losses = [re.findall(r"(\d+\.\d{4}) \(", line) for line in table.splitlines() if ", step " in line]
        yield f"{'val/loss on':<22}" + "".join(f"{name:>10}" for name in folders)
        yield from (f"{name:<22}" + "".join(f"{float(v):>10.3f}" for v in row) for name, row in zip(names, losses, strict=True))


def size(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    latin, count = texts("latin", python_texts()), steps or 1000
    for seed in seeds:
        for multiplier in (4, 8, 16):
            settings = {"dataset.parquet_dir": latin, "model.mlp_internal_dim_multiplier": multiplier, "training.seed": seed}
            run = train(f"size-{multiplier}-{seed}", settings, count)
            config = Config.from_yaml(Path(run) / "config.yaml")
            gpt = gpt_loss(config, seed)
            yield (
                f"seed {seed}: n {multiplier * config.model.n_embd:>5}, {config.parameters / 1e6:.2f} M: "
                f"BDH {loss_of(run):.3f} ({seconds_of(run):.0f} s); "
                f"GPT {gpt.parameters / 1e6:.2f} M: {gpt.loss:.3f} ({gpt.seconds:.0f} s)"
            )


def activity(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    latin, count = texts("latin", python_texts()), steps or 2000
    for seed in seeds:
        settings = {"dataset.parquet_dir": latin, "training.seed": seed, "tracking.analyze_freq": count // 4}
        run = train(f"activity-{seed}", settings, count)
        yield f"seed {seed}: active neurons of a token, %, layers 0 and 1; never active in the validation text"
        for step, values in points(run, "analysis/(active|dead)_(x|xy)_l"):
            active = {key.removeprefix("analysis/"): f"{100 * value:.1f}" for key, value in sorted(values.items())}
            yield f"step {step:>5}: " + ", ".join(f"{key} {value}" for key, value in active.items())


def detach(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    latin, count = texts("latin", python_texts()), steps or 1000
    for seed in seeds:
        settings = {"dataset.parquet_dir": latin, "training.seed": seed}
        losses = [
            loss_of(train(f"detach-{detached}-{seed}", {**settings, "training.detach_state": detached}, count))
            for detached in ("false", "true")
        ]
        config = Config.from_yaml(QUICKSTART, [f"dataset.parquet_dir={latin}"])
        yield f"seed {seed}: with backpropagation through time {losses[0]:.3f}, without {losses[1]:.3f}; bigrams {bigram_loss(config):.3f}"


def carry(seeds: Sequence[int], steps: int | None) -> Iterator[str]:
    latin, count = texts("latin", python_texts()), steps or 1000
    for seed in seeds:
        settings = {"dataset.parquet_dir": latin, "training.seed": seed}
        for carries, decay in (("false", 0), ("true", 0), ("true", 1), ("true", 4), ("true", 16), ("false", 4)):
            given = {**settings, "training.carry_state": carries, "model.attention_decay": decay}
            run = train(f"carry-{carries}-{decay}-{seed}", given, count)
            printed = command("evaluate", run, "--carry", "--no-log", "--batches", "100")
            (carried,), (alone,) = (re.findall(pattern, printed) for pattern in (r"val/loss_carried (\S+)", r"val/loss_stream (\S+):"))
            yield (
                f"seed {seed}, carry_state {carries}, attention_decay {decay}: windows alone {float(alone):.3f}, "
                f"with the state before {float(carried):.3f}"
            )


# Texts


def _cycles() -> Iterator[str]:
    """The first 13 letters, then a random word of 8 different ones 8 times."""
    draw = random.Random(0)
    while True:
        yield string.ascii_lowercase[:WARM_UP] + "".join(draw.sample(string.ascii_lowercase, WORD)) * TIMES


def _floor() -> float:
    """Nats per token that nobody can predict: which letters come next the first time. The separator and the repetitions are free."""
    unknown = sum(math.log(26 - known) for known in range(WORD))
    return unknown / (WARM_UP + WORD * TIMES + 1)


def python_texts() -> list[str]:
    """The documents of Python's standard library, as quickstart has them."""
    folder = Path("data/python-stdlib")
    if not folder.is_dir():
        command("data", "prepare", "python-stdlib", str(folder))
    return [text for file in sorted(folder.glob("*.parquet")) for text in pq.read_table(file)["text"].to_pylist()]


def texts(name: str, documents: Iterator[str] | list[str]) -> str:
    """A folder with these documents; the one that is there, if there is one."""
    folder = Path("data") / name
    if not folder.is_dir():
        made = folder.with_name(f".{name}")
        made.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": pa.array(list(documents), pa.string())}), made / "0.parquet", row_group_size=ROWS)
        made.rename(folder)
    return str(folder)


# Trainings


def command(*words: str) -> str:
    """A command of bdh-mlflow.   Returns what it prints; ends this program if it fails."""
    config = [] if words[0] == "data" else ["--config", str(QUICKSTART)]
    done = subprocess.run([sys.executable, "-m", "bdh_mlflow", *words, *config], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bdh-mlflow {' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def train(name: str, settings: Mapping[str, object], steps: int, base: str | None = None) -> str:
    """Train quickstart's network with other settings; the same one that is there is taken.   base: forked.   Returns its directory."""
    known = Path("runs.json")
    runs: dict[str, str] = json.loads(known.read_text()) if known.exists() else {}
    key = json.dumps([name, sorted((k, str(v)) for k, v in settings.items()), steps, base])
    if key not in runs or not Path(runs[key]).is_dir():
        given = {**PLAIN, **settings, "training.max_iters": steps, "training.test_freq": steps, "training.checkpoint_freq": steps}
        given["tracking.run_name"] = name
        words = [word for setting, value in given.items() for word in ("--set", f"{setting}={value}")]
        printed = command("train", *words, *(["--resume", base, "--fork"] if base else []))
        (folder,) = re.findall(r"^Checkpoints: (.+)$", printed, re.MULTILINE)
        runs[key] = folder
        known.write_text(json.dumps(runs, indent=1))
    return runs[key]


def loss_of(run: str) -> float:
    """val/loss of a run's last checkpoint."""
    manifests = [json.loads(path.read_text()) for path in Path(run).glob("checkpoint_*.json")]
    return float(max(manifests, key=lambda manifest: manifest["step"])["val_loss"])


def seconds_of(run: str) -> float:
    """From the first record of a run to its last."""
    records = (Path(run) / "journal.jsonl").read_text().splitlines()
    return float(json.loads(records[-1])["at_ms"] - json.loads(records[0])["at_ms"]) / 1000


def points(run: str, pattern: str) -> list[tuple[int, dict[str, float]]]:
    """Metrics of a run whose names match, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (Path(run) / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "points":
            for key, value in record["values"].items():
                if re.match(pattern, key):
                    found.setdefault(record["step"], {})[key] = value
    return sorted(found.items())


def _merged(runs: list[str], *words: str) -> tuple[str, str]:
    """The directory of the merged model, and how alike its parts are."""
    printed = command("checkpoints", "merge", *runs, *words)
    (folder,) = re.findall(r"^Checkpoint: (.+)$", printed, re.MULTILINE)
    (alike,) = re.findall(r"alike by (\S+)", printed)
    return folder, alike


# A GPT, and bigrams


class Trained:
    """What a GPT has reached."""

    def __init__(self, loss: float, parameters: int, seconds: float) -> None:
        self.loss, self.parameters, self.seconds = loss, parameters, seconds


class Gpt(nn.Module):
    """Torch's own layers: learned positions, pre-norm blocks with GELU, output weights tied to the embedding."""

    def __init__(self, width: int, layers: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(256, width), nn.Embedding(block_size, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for embedding in (self.embed, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy.   idx, targets: (B, T)."""
        causal = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        x = self.embed(idx) + self.positions.weight[: idx.shape[1]]
        logits = self.blocks(x, mask=causal, is_causal=True) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt_loss(config: Config, seed: int) -> Trained:
    """Train a GPT of as many parameters on the same batches, for as many steps, at its better rate of two, and evaluate it the same way."""
    layers, heads, training = 4, 4, config.training
    width = heads * round(math.sqrt(config.parameters / (12 * layers)) / heads)
    text = ParquetText(config.dataset)
    windows = validation.drawn(text, training.test_iters, training.batch_size, training.block_size)
    best = None
    for rate in (1e-3, 3e-3):
        torch.manual_seed(seed)
        model = Gpt(width, layers, heads, training.block_size)
        plan = Order(config.dataset.max_cached_files, training.batch_size, training.block_size, seed, 1, range(1))
        batches = iter(TrainingBatches(text, plan, None))
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=training.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, training.max_iters, pct_start=0.1)
        begun = time.perf_counter()
        for _ in range(training.max_iters):
            tokens = next(batches).tokens.long()
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), training.grad_clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begun
        model.eval()
        with torch.no_grad():
            losses = [float(model(w[:, :-1].long(), w[:, 1:].long())) for w in windows]
        value = sum(losses) / len(losses)
        if best is None or value < best.loss:
            best = Trained(value, sum(p.numel() for p in model.parameters()), seconds)
    assert best is not None
    return best


def bigram_loss(config: Config) -> float:
    """Nats per byte of the best prediction from the byte before alone: counts of the training text, plus one."""
    text, training = ParquetText(config.dataset), config.training
    counts = torch.ones(256, 256, dtype=torch.float64)
    plan = Order(config.dataset.max_cached_files, 64, 512, 1, 1, range(1))
    for batch in itertools.islice(TrainingBatches(text, plan, None), 200):
        tokens = batch.tokens.long()
        pairs = tokens[:, :-1].flatten() * 256 + tokens[:, 1:].flatten()
        counts += torch.bincount(pairs, minlength=256 * 256).view(256, 256)
    likely = (counts / counts.sum(dim=1, keepdim=True)).log()
    windows = validation.drawn(text, training.test_iters, training.batch_size, training.block_size)
    losses = [float(-likely[w[:, :-1].long(), w[:, 1:].long()].mean()) for w in windows]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
