"""What the data pipeline costs, as ratios in one process: `python benchmarks/data.py [--files 1000] [--megabytes 10] [--tokens]`.

1. Bytes a second of training batches, against pyarrow reading the same column, and against a simple loader that reads a whole row group
   for every sample.
2. Resident memory while an epoch over many files is read, beside the bytes of the row groups that are open.
3. Time to the first batch at position 0 and in the middle of an epoch.
4. The same text in an S3 store 0, 20 and 200 ms away (`scripts/team.py` says what that needs): MB of text a second, first batch at both
   positions, and the share of its time that a training of 100,000 tokens a second waits for text.

--tokens: 1 and 2 with a vocabulary instead (a byte-level BPE of 4,096): tokens prepared beside the text, against pyarrow reading their
column, and made while the text is read; what one and all cores prepare in a second.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data.columns import TOKENS
from bdh_mlflow.data.order import Batch, Order, Position, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.data.prepare import prepare
from bdh_mlflow.data.shards import Tokenizing
from bdh_mlflow.data.usage import training_texts
from bdh_mlflow.vocabulary import of_content
from bdh_mlflow.vocabulary.learn import learn_bpe
from scripts import team
from scripts.relay import Relay

BLOCK_SIZE, BATCH_SIZE, LANES, SEED = 512, 8, 5, 1
DOCUMENT_BYTES = 3000  # about FineWeb's mean
ROW_GROUP_ROWS = 1000  # FineWeb's
ROUNDS = 3
TOKENS_PER_S, WATCHED_S = 100_000, 60
VOCABULARY = 4096


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--files", type=int, default=1000)
    options.add_argument("--megabytes", type=float, default=10.0, help="text in one file")
    options.add_argument("--dir", help="where the data is made; a temporary folder if not given")
    options.add_argument("--tokens", action="store_true", help="with a vocabulary")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        one = Path(folder) / "one"
        write(one / "0.parquet", int(given.megabytes * 1e6) * 8)  # large enough to time
        if given.tokens:
            with_vocabulary(one, Path(folder), given.files, int(given.megabytes * 1e6))
            return
        throughput(opened(one))
        many = Path(folder) / "many"
        write(many / "0000.parquet", int(given.megabytes * 1e6))
        for i in range(1, given.files):  # the same bytes under many names: for memory and seeking that is as good
            os.link(many / "0000.parquet", many / f"{i:04d}.parquet")
        started = time.perf_counter()
        text = opened(many)
        digest = text.digest
        print(f"index and digest of {given.files} files: {time.perf_counter() - started:.2f} s ({digest[:8]}...)")
        first_batch(text)
        memory(text)
        if reason := team.missing():
            print(f"not measured: text in a bucket ({reason})")
            return
        in_bucket(one, Path(folder) / "s3")


def throughput(text: ParquetText) -> None:
    def pyarrow_alone() -> int:
        size = 0
        for file in text.files:
            with pq.ParquetFile(file) as opened_file:
                for i in range(opened_file.num_row_groups):
                    size += opened_file.read_row_group(i, columns=["text"]).nbytes
        return size

    def ours() -> int:
        return sum(b.tokens.numel() for b in itertools.takewhile(lambda b: b.epoch < 0.95, batches(text)))

    def row_group_per_sample() -> int:
        with pq.ParquetFile(text.files[0]) as opened_file:
            draw, size = np.random.default_rng(0), 0
            for _ in range(20):
                column = opened_file.read_row_group(int(draw.integers(opened_file.num_row_groups)), columns=["text"]).column("text")
                sample = column[int(draw.integers(len(column)))].as_py().encode()[: BLOCK_SIZE + 1]
                size += np.frombuffer(sample.ljust(BLOCK_SIZE + 1, b"\0"), np.uint8).size
            return size

    rates: dict[str, list[float]] = {f.__name__: [] for f in (pyarrow_alone, ours, row_group_per_sample)}
    for _ in range(ROUNDS):
        for work in (pyarrow_alone, ours, row_group_per_sample):
            rates[work.__name__].append(rate(work))
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in middle.items():
        print(f"{name}: {value / 1e6:,.2f} MB/s (median of {ROUNDS})")
    print(f"ours / pyarrow alone: {middle['ours'] / middle['pyarrow_alone']:.2f} (required: at least 0.25)")
    print(f"ours / row group per sample: {middle['ours'] / middle['row_group_per_sample']:,.0f} (required: at least 100)")


def with_vocabulary(one: Path, home: Path, files: int, size: int) -> None:
    """Prepared and made on the fly; then memory over many files."""
    tokenizer = of_content("huggingface", learn_bpe(training_texts(opened(one)), VOCABULARY), None, "benchmark")
    cores = len(os.sched_getaffinity(0))
    for processes in dict.fromkeys((1, cores)):
        started = time.perf_counter()
        target = home / f"tokens-{processes}"
        done = prepare(str(one), target, "text", tokenizing=Tokenizing(tokenizer, processes)).written
        seconds = time.perf_counter() - started
        print(
            f"prepared by {processes}: {done.bytes / 1e6 / seconds:.1f} MB of text a second, {done.bytes / done.tokens:.2f} bytes a token"
        )
    text = ParquetText(DatasetConfig(parquet_dir=str(target), val_fraction=0.01), tokenizer=tokenizer)
    on_the_fly = ParquetText(DatasetConfig(parquet_dir=str(one), val_fraction=0.01), tokenizer=tokenizer)

    def pyarrow_alone() -> int:
        count = 0
        for file in text.files:
            with pq.ParquetFile(file) as opened_file:
                for i in range(opened_file.num_row_groups):
                    count += len(opened_file.read_row_group(i, columns=[TOKENS]).column(TOKENS).combine_chunks().flatten())
        return count

    def tokens_of(source: ParquetText, until: float) -> int:
        return sum(b.tokens.numel() for b in itertools.takewhile(lambda b: b.epoch < until, batches(source)))

    rates: dict[str, list[float]] = {"pyarrow alone": [], "prepared": []}
    for _ in range(ROUNDS):
        rates["pyarrow alone"].append(rate(pyarrow_alone))
        rates["prepared"].append(rate(lambda: tokens_of(text, 0.95)))
    middle = {name: statistics.median(values) for name, values in rates.items()} | {"on the fly": rate(lambda: tokens_of(on_the_fly, 0.3))}
    for name, value in middle.items():
        print(f"{name}: {value / 1e6:,.2f} M tokens a second, {value * done.bytes / done.tokens / 1e6:,.1f} MB of text")
    print(f"prepared / pyarrow alone: {middle['prepared'] / middle['pyarrow alone']:.2f}")
    small, many = home / "small", home / "many"
    write(small / "0.parquet", size)
    prepare(str(small), many, "text", tokenizing=Tokenizing(tokenizer, cores))
    for i in range(1, files):
        os.link(many / "part-00000.parquet", many / f"copy-{i:04d}.parquet")
    memory(ParquetText(DatasetConfig(parquet_dir=str(many), val_fraction=0.01), tokenizer=tokenizer))


def first_batch(text: ParquetText) -> None:
    middle = next(b.position for b in batches(text) if b.epoch > 0.02)
    middle["next_unit"] += len(text.row_groups) // 2
    for lane in middle["lanes"]:
        lane[0] += len(text.row_groups) // 2
        lane[1] = 1  # in the middle of a row group, as nearly every position is
        del lane[3:]
    times: dict[str, list[float]] = {"position 0": [], "the middle": []}
    next(batches(text))  # the first call in a process costs more, whatever the position
    for turn in range(20):
        for name, position in (("position 0", None), ("the middle", middle))[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            next(batches(text, position))
            times[name].append(time.perf_counter() - started)
    start, half = (statistics.median(times[name]) for name in ("position 0", "the middle"))
    print(f"first batch at position 0: {1e3 * start:.1f} ms, in the middle of the epoch: {1e3 * half:.1f} ms, ratio {half / start:.2f}")


def memory(text: ParquetText) -> None:
    process = psutil.Process()
    largest = max(text.training_tokens(g).nbytes for g in text.row_groups[:20])
    before = process.memory_info().rss
    marks = iter(range(1, 11))
    mark = next(marks)
    seen = []
    for batch in batches(text):
        if batch.epoch * 10 >= mark:
            seen.append((process.memory_info().rss - before) / 2**20)
            mark = next(marks, 0)
            if not mark:
                break
    print(f"open row groups: {LANES} of {largest / 2**20:.1f} MiB; resident memory above the start, at each tenth of the epoch, MiB:")
    print("  " + " ".join(f"{value:.0f}" for value in seen))


def in_bucket(folder: Path, home: Path) -> None:
    store = team.ObjectStore(home)
    try:
        for file in folder.glob("*.parquet"):
            store.client().upload_file(str(file), team.BUCKET, f"text/{file.name}")
        os.environ |= store.variables
        local = opened(folder)
        middle = next(b.position for b in batches(local) if b.epoch > 0.5)
        print(f"{'ms away':>8}{'index, s':>10}{'MB/s':>8}{'first batch, s':>16}{'in the middle':>15}{'waiting at 100,000 tokens/s':>29}")
        for delay_ms in (0, 20, 200):
            relay = Relay(store.port, delay_s=delay_ms / 1000)
            started = time.perf_counter()
            endpoint = f"?endpoint_override=127.0.0.1:{relay.port}&scheme=http"
            text = ParquetText(DatasetConfig(parquet_dir=f"s3://{team.BUCKET}/text{endpoint}", val_fraction=0.01))
            index_s = time.perf_counter() - started
            assert text.digest == local.digest
            firsts = []
            for position in (None, middle):
                started = time.perf_counter()
                next(batches(text, position))
                firsts.append(time.perf_counter() - started)
            speed = rate(lambda text=text: sum(b.tokens.numel() for b in itertools.takewhile(lambda b: b.epoch < 0.4, batches(text))))  # type: ignore[misc]
            share = 100 * waiting(text, middle)
            print(f"{delay_ms:8}{index_s:10.2f}{speed / 1e6:8.1f}{firsts[0]:16.2f}{firsts[1]:15.2f}{share:27.2f} %", flush=True)
            relay.close()
    finally:
        store.stop()


def waiting(text: ParquetText, position: Position) -> float:
    """Share of its time that a training waits for batches, after the first one."""
    loaded, waited_s = batches(text, position), 0.0
    next(loaded)
    began = time.perf_counter()
    while time.perf_counter() - began < WATCHED_S:
        time.sleep(BATCH_SIZE * BLOCK_SIZE / TOKENS_PER_S)  # the update
        started = time.perf_counter()
        next(loaded)
        waited_s += time.perf_counter() - started
    return waited_s / WATCHED_S


def batches(text: ParquetText, position: Position | None = None) -> Iterator[Batch]:
    order = TrainingBatches(text, Order(LANES, BATCH_SIZE, BLOCK_SIZE, SEED), position)
    return iter(order)


def rate(work: Callable[[], int]) -> float:
    started = time.perf_counter()
    return work() / (time.perf_counter() - started)


def opened(folder: Path) -> ParquetText:
    return ParquetText(DatasetConfig(parquet_dir=str(folder), val_fraction=0.01))


def write(path: Path, size: int) -> None:
    """Made-up text that compresses about as text does."""
    path.parent.mkdir(parents=True)
    draw = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in draw.integers(0, 26, draw.integers(2, 9))) for _ in range(5000)])
    documents = []
    full_groups = max(1, size // DOCUMENT_BYTES // ROW_GROUP_ROWS)  # of equal size, or the cost of a position would depend on where it lies
    for _ in range(full_groups * ROW_GROUP_ROWS):
        documents.append(" ".join(words[draw.zipf(1.3, DOCUMENT_BYTES // 6) % len(words)]))
    pq.write_table(pa.table({"id": range(len(documents)), "text": documents}), path, row_group_size=ROW_GROUP_ROWS)


if __name__ == "__main__":
    main()
