"""From the command to the first step: `python benchmarks/startup.py [--config configs/quickstart.yaml] [--rounds 10] [--checkout DIR]`.

Trains two steps of the configuration with a store that is a file, resumes the run from its directory for two more, and does so `--rounds`
times after one that is not counted. Prints the seconds from the start of the process to the end of the first update (its time stamp in the
journal), fresh and resumed, to the end of the command, and of `--help`: median, least and most. `--checkout` measures the package of
another working tree, in turns with this one; the ratio compares the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent.parent
WHAT = ("first step of a new run", "first step of a resumed run", "two steps, to the end of the command", "--help")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--config", default="configs/quickstart.yaml")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--checkout", type=Path, help="another working tree, to compare with")
    given = options.parse_args()
    trees = [HERE] + ([given.checkout.resolve()] if given.checkout else [])
    took: dict[Path, list[tuple[float, ...]]] = {tree: [] for tree in trees}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folders = {tree: Path(name) / str(number) for number, tree in enumerate(trees)}
        for number in range(given.rounds + 1):  # the first builds the text, the database and the compiled passes
            for tree, folder in folders.items():
                folder.mkdir(exist_ok=True)
                times = one_round(tree, folder, Path(given.config).resolve())
                if number:
                    took[tree].append(times)
                    print(f"{number:3} {tree}: " + ", ".join(f"{each:.2f}" for each in times), flush=True)
    heads = "".join(f"{str(tree)[-24:]:>28}" for tree in trees)
    print(f"{'seconds: median (least, most)':38}{heads}" + f"{'ratio':>8}" * (len(trees) == 2))
    for row, what in enumerate(WHAT):
        columns = [[times[row] for times in took[tree]] for tree in trees]
        medians = [statistics.median(column) for column in columns]
        shown = "".join(f"{f'{m:.2f} ({min(c):.2f}, {max(c):.2f})':>28}" for m, c in zip(medians, columns, strict=True))
        print(f"{what:38}{shown}" + (f"{medians[0] / medians[1]:8.2f}" if len(trees) == 2 else ""))


def one_round(tree: Path, folder: Path, config: Path) -> tuple[float, ...]:
    """The four times of `WHAT`, seconds."""
    steps = ("training.log_freq=1", "training.test_freq=1000", "training.test_iters=1", "training.checkpoint_freq=1000")
    words = [word for setting in steps for word in ("--set", setting)]
    fresh, ended_s = first_step(tree, folder, ["train", "--config", str(config), *words, "--set", "training.max_iters=2"])
    run_dir = max((folder / "checkpoints").iterdir())
    more = ["train", "--config", str(config), *words, "--set", "training.max_iters=4", "--resume", str(run_dir)]
    resumed, _ = first_step(tree, folder, more)
    began = time.perf_counter()
    command(tree, folder, ["--help"])
    return fresh, resumed, ended_s, time.perf_counter() - began


def first_step(tree: Path, folder: Path, words: list[str]) -> tuple[float, float]:
    """Seconds to the time stamp of the first point of `train/loss`, and to the end of the command."""
    began = time.time()
    command(tree, folder, words)
    ended = time.time()
    journal = max((folder / "checkpoints").iterdir()) / "journal.jsonl"
    stamps = [r["at_ms"] / 1000 for line in journal.read_text().splitlines() if "train/loss" in (r := json.loads(line)).get("values", {})]
    return min(stamp for stamp in stamps if stamp > began) - began, ended - began


def command(tree: Path, folder: Path, words: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-m", "bdh_mlflow", *words], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)} in {tree}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
