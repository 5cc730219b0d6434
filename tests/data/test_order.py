"""The order of batches: every token once an epoch, resumable at any position, the same for any number of workers."""

import itertools
import json
import multiprocessing
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow.config import DataLoaderConfig
from bdh_mlflow.data import parquet, validation
from bdh_mlflow.data.order import Batch, Order, TrainingBatches, training_loader
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import DataError
from tests.conftest import documents, write_shards
from tests.data.test_parquet import all_bytes, opened
from tests.vocabulary import made


def batches(
    text: ParquetText, count: int, position: Any = None, *, lanes: int = 3, batch_size: int = 4, block_size: int = 8
) -> list[Batch]:
    order = TrainingBatches(text, Order(lanes, batch_size, block_size, 7), position)
    return [batch for batch, _ in zip(order, range(count), strict=False)]


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.tokens, y.tokens) and x[1:] == y[1:] for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("block_size", [1, 8, 300])
def test_each_token_is_predicted_once_per_epoch(tmp_path: Path, lanes: int, block_size: int) -> None:
    """Over two epochs, up to what the lanes still hold: transitions (token -> next) are those of the text, none twice, none missing."""
    texts = [chr(0x100 + i) * 3 for i in range(120)]  # every document its own letter
    write_shards(tmp_path, texts, shards=2, row_group_size=16)
    text = opened(tmp_path)
    epoch_bytes = len(all_bytes(text))
    targets: Counter[int] = Counter()
    windows = 2 * epoch_bytes // block_size
    for batch in batches(text, windows, lanes=lanes, batch_size=1, block_size=block_size):
        targets.update(batch.tokens[0, 1:].tolist())
    expected = Counter(all_bytes(text))
    slack = lanes * (max(g.rows for g in text.row_groups) * 7 + block_size)  # bytes in row groups half consumed
    missing = sum(abs(targets[t] - 2 * expected[t]) for t in expected)
    assert missing <= slack
    assert set(targets) == set(expected)


@pytest.mark.parametrize("kind", made.KINDS)
def test_one_lane_gives_every_token_of_an_epoch_exactly_once(tmp_path: Path, kind: str) -> None:
    made.written(tmp_path, kind, documents(40), shards=1, row_group_size=10)
    text = made.opened(tmp_path, kind)
    tokens = Counter(token for group in text.row_groups for token in text.training_tokens(group).tolist())
    total = tokens.total()
    windows = [b.tokens[0] for b in batches(text, 3 * total, lanes=1, batch_size=1, block_size=1)]
    targets = [int(window[1]) for window in windows]
    for epoch in range(3):
        assert Counter(targets[epoch * total : (epoch + 1) * total]) == tokens, epoch


def test_windows_hold_running_text_across_documents_and_row_groups(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc", "defg", "hi"], shards=1, row_group_size=1)
    windows = batches(opened(tmp_path), 3, lanes=1, batch_size=1, block_size=4)
    stream = "".join(chr(t) for i, b in enumerate(windows) for t in b.tokens[0].tolist()[(i > 0) :])
    assert sorted(stream[1:].split("\0")[:3]) == ["abc", "defg", "hi"]
    assert stream[0] == "\0"


@pytest.mark.parametrize(("kind", "row_group_size"), [("byte", 1), ("byte", 16), ("text", 16), ("tokens", 1), ("tokens", 16)])
@pytest.mark.parametrize("block_size", [8, 100])
def test_any_position_continues_with_the_batch_that_would_have_followed(
    tmp_path: Path, kind: str, row_group_size: int, block_size: int
) -> None:
    made.written(tmp_path, kind, documents(60), row_group_size=row_group_size)
    text = made.opened(tmp_path, kind)
    uninterrupted = batches(text, 40, block_size=block_size)
    for k in range(39):
        resumed = batches(made.opened(tmp_path, kind), 2, json.loads(json.dumps(uninterrupted[k].position)), block_size=block_size)
        assert same(resumed[:1], uninterrupted[k + 1 : k + 2]), k


def test_order_depends_on_the_seed_and_differs_between_epochs(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(60))
    text = opened(tmp_path)
    first, other = (next(iter(TrainingBatches(text, Order(2, 4, 8, seed), None))).tokens for seed in (1, 2))
    assert not torch.equal(first, other)
    orders = [parquet.shuffled(100, 7, -1 - epoch).tolist() for epoch in range(2)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))


@pytest.mark.parametrize(("kind", "batch_size"), [("byte", 1), ("byte", 2), ("byte", 3), ("byte", 7), ("byte", 50), ("tokens", 7)])
def test_windows_come_in_one_order_whatever_the_batch_size(tmp_path: Path, kind: str, batch_size: int) -> None:
    made.written(tmp_path, kind, documents(60), row_group_size=16)
    text = made.opened(tmp_path, kind)
    one_by_one = torch.cat([b.tokens for b in batches(text, 400, batch_size=1)])
    at_once = torch.cat([b.tokens for b in batches(text, 400 // batch_size, batch_size=batch_size)])
    assert torch.equal(one_by_one[: len(at_once)], at_once)


def test_memory_is_that_of_one_row_group_a_lane(tmp_path: Path) -> None:
    """Over an epoch of 40 row groups of 20 KB, each 22.5 KB as windows; the permutation of one row group takes another 100 KB."""
    write_shards(tmp_path, ["x" * 20_000] * 40, shards=1, row_group_size=1)
    order = iter(TrainingBatches(opened(tmp_path), Order(3, 100, 8, 7), None))
    next(order)
    tracemalloc.start()
    while next(order).epoch < 1:
        pass
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 300_000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("kind", ["byte", "text"])
def test_order_is_the_same_for_any_number_of_workers(tmp_path: Path, kind: str) -> None:
    made.written(tmp_path, kind, documents(60))
    text = made.opened(tmp_path, kind)
    expected = batches(text, 9)
    for workers in (1, 2):
        order = TrainingBatches(text, Order(3, 4, 8, 7), expected[1].position)
        loader = training_loader(order, DataLoaderConfig(num_workers=workers), cuda=False)
        assert same([next(loader) for _ in range(7)], expected[2:]), workers


def test_text_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, ["abc", "def", "ghi"], shards=1, row_group_size=1)
    with pytest.raises(DataError, match=r"does not fill one window of block_size 100; lower training.block_size or add text"):
        batches(opened(tmp_path), 1, block_size=100)
    with pytest.raises(DataError, match=r"validation text has 4 tokens, block_size 100 needs more; raise dataset.val_fraction"):
        validation.drawn(opened(tmp_path, val_fraction=0.01), 1, 1, 100)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])  # workers are processes that import torch
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_passes_of_each_update_in_blocks(tmp_path: Path, processes: int, workers: int) -> None:
    write_shards(tmp_path, documents(40), row_group_size=5)
    text = opened(tmp_path)
    straight, passes = batches(text, 12), 4
    for rank in range(processes):
        own = range(rank * passes // processes, (rank + 1) * passes // processes)
        order = TrainingBatches(text, Order(3, 4, 8, 7, passes, own), None)
        loaded = training_loader(order, DataLoaderConfig(num_workers=workers), False)
        for update in range(3):
            for number in own:
                batch = next(loaded)
                assert torch.equal(batch.tokens, straight[passes * update + number].tokens)
            assert batch.position == straight[passes * update + passes - 1].position, "where the next update starts, for every process"
            assert batch.epoch == straight[passes * update + passes - 1].epoch


@pytest.mark.parametrize(("kind", "shards", "row_group_size"), [("byte", 2, 4), ("byte", 1, 100), ("tokens", 1, 30)])
def test_rows_that_read_on_give_the_text_as_it_is(tmp_path: Path, kind: str, shards: int, row_group_size: int) -> None:
    """Whatever the row groups, also fewer than rows: windows join, every token comes once an epoch, and from any position on."""
    made.written(tmp_path, kind, documents(80), shards=shards, row_group_size=row_group_size)
    text = made.opened(tmp_path, kind)
    plan = Order(1, 3, 8, 7, passes=2, own=range(2), consecutive=True)

    def updates(position: Any = None) -> Iterator[tuple[torch.Tensor, Any]]:
        found = iter(TrainingBatches(text, plan, position))
        while True:
            first, second = next(found), next(found)
            yield torch.cat([first.tokens, second.tokens]), second

    every = list(itertools.islice(updates(), 40))
    for (before, _), (after, _) in itertools.pairwise(every):
        assert torch.equal(before[:, -1], after[:, 0])
    groups = [text.training_tokens(group) for group in text.row_groups]
    epoch = Counter(np.concatenate(groups).tolist())
    read, seen, number = Counter[int](), 0.0, 0
    for tokens, batch in updates():
        read.update(tokens[:, 1:].flatten().tolist())
        seen, number = batch.epoch, number + 1
        if seen >= 2:
            break
    held = 6 * (8 + max(map(len, groups)) * 6)  # of parts half read
    assert sum(abs(read[token] - 2 * count) for token, count in epoch.items()) <= held
    assert number * 6 * 8 == read.total()
    for k in (0, 1, 17):
        assert torch.equal(next(updates(json.loads(json.dumps(every[k][1].position))))[0], every[k + 1][0])


def test_a_row_group_that_rows_share_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary each reading would encode it again."""
    write_shards(tmp_path, documents(90), shards=1, row_group_size=30)
    text, read = opened(tmp_path), list[int]()
    real = text.training_tokens
    monkeypatch.setattr(text, "training_tokens", lambda group: read.append(group.number) or real(group))
    for position in (None, next(iter(TrainingBatches(text, Order(1, 12, 8, 7, consecutive=True), None))).position):
        read.clear()
        batches = iter(TrainingBatches(text, Order(1, 12, 8, 7, consecutive=True), position))
        while next(batches).epoch < 1:
            pass
        assert len(read) <= 3 + 3 + 1, "once an epoch, and what the next one begins with"


def test_tokens_are_the_same_prepared_and_made_when_they_are_read(tmp_path: Path) -> None:
    """Windows, positions and epochs; the text is the same documents, so a training may go over from one to the other."""
    for kind in ("text", "tokens"):
        made.written(tmp_path / kind, kind, documents(60), row_group_size=16)
    of_text, prepared = (made.opened(tmp_path / kind, kind, 0.2) for kind in ("text", "tokens"))
    assert same(batches(of_text, 30), batches(prepared, 30))
    held_out = [torch.cat(validation.drawn(text, 8, 4, 8)) for text in (of_text, prepared)]
    assert torch.equal(*held_out)
    assert held_out[0].dtype == torch.uint16


class LargeBatches(TrainingBatches):
    """Each takes a moment to be handed over."""

    def __init__(self) -> None:
        pass

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield Batch(torch.zeros(50_000_000), {}, 0)


@pytest.mark.slow  # a worker imports torch; it ended by an abort each time
def test_a_worker_that_is_handing_over_a_batch_ends_in_good_order(capfd: pytest.CaptureFixture[str]) -> None:
    before = set(multiprocessing.active_children())
    loader = training_loader(LargeBatches(), DataLoaderConfig(num_workers=1), cuda=False)
    assert next(loader).tokens.shape == (50_000_000,)
    (worker,) = set(multiprocessing.active_children()) - before
    del loader
    worker.join(60)
    assert worker.exitcode == 0
    assert capfd.readouterr().err == ""


@pytest.mark.slow  # a process with workers, to its very end
def test_a_training_with_workers_ends(store: MlflowClient, text: Path, tiny: Path) -> None:
    """They mind no signals, so whoever waits until one has ended them waits for ever."""
    words = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(tiny), "--set", "dataloader.num_workers=2"]
    done = subprocess.run(words, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
