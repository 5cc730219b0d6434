"""Malformed input in numbers: `python benchmarks/fuzz.py [--inputs 50000] [--seed 1]`.

Mutates valid settings, overrides, sweep spaces, checkpoints, manifests, parquet files, journals and their state, and gives each to whoever
reads it (see scripts/fuzz.py). Prints each finding with what reproduces it, and how many inputs of each kind were tried. Exit code 1 if
there is one.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.progress import Progress

from scripts.fuzz import all_kinds, findings


def main() -> None:
    """Try them all."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--inputs", type=int, default=50_000)
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    tried: Counter[str] = Counter()
    found = 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("inputs", total=given.inputs)

        def count(kind: str) -> None:
            tried.update([kind])
            progress.advance(task)

        for finding in findings(all_kinds(Path(name)), Path(name), given.inputs, given.seed, count):
            found += 1
            print(f"{finding.kind}, input {finding.number} of seed {given.seed}:\n{finding.what}\n  {finding.content[:300]!r}")
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in tried.items())
    print(f"{tried.total():,} inputs in {time.perf_counter() - started:.0f} s ({kinds}): {found} findings")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
