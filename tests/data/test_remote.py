"""Text in a bucket is the same text as in a folder: digest, split, order, positions, and what an outage costs is time."""

import itertools
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow.config import Config, DataLoaderConfig, DatasetConfig
from bdh_mlflow.data import order, remote, validation
from bdh_mlflow.data.order import Batch, Order, TrainingBatches
from bdh_mlflow.data.parquet import UNFINISHED, ParquetText
from bdh_mlflow.data.prepare import prepare
from bdh_mlflow.data.remote import RemotePath, place_of
from bdh_mlflow.errors import DataError
from scripts.team import BUCKET, Team
from tests.conftest import documents, history, only_run, run_cli, train, write_shards
from tests.stores import needs_stores

pytestmark = needs_stores
PLAN = Order(lanes=3, batch_size=2, block_size=16, seed=1)


@pytest.fixture
def bucket(stores: Team, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """URI of an empty place in the bucket."""
    for name, value in stores.s3.variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture
def both(stores: Team, bucket: str, tmp_path: Path) -> tuple[ParquetText, ParquetText]:
    """The same text in a folder and in the bucket."""
    folder = tmp_path / "both"
    write_shards(folder, documents(400), shards=3, row_group_size=10)
    (folder / "more").mkdir()
    (folder / "part-0.parquet").rename(folder / "more" / "part-0.parquet")
    client = stores.s3.client()
    for file in folder.rglob("*.parquet"):
        client.upload_file(str(file), BUCKET, f"{bucket.rpartition('/')[2]}/{file.relative_to(folder)}")
    dataset = DatasetConfig(parquet_dir=str(folder), val_fraction=0.2)
    return ParquetText(dataset), ParquetText(replace(dataset, parquet_dir=bucket))


def same(one: Iterator[Batch], other: Iterator[Batch], count: int) -> None:
    for here, there in zip(itertools.islice(one, count), itertools.islice(other, count), strict=True):
        assert torch.equal(here.tokens, there.tokens)
        assert (here.position, here.epoch) == (there.position, there.epoch)


def test_digest_validation_text_batches_and_positions_are_those_of_the_folder(both: tuple[ParquetText, ParquetText]) -> None:
    folder, bucket = both
    assert (bucket.digest, bucket.manifest, bucket.rows) == (folder.digest, folder.manifest, folder.rows)
    drawn = [validation.drawn(text, 6, 2, 16) for text in both]
    assert all(torch.equal(here, there) for here, there in zip(*drawn, strict=True))
    assert len(drawn[0]) == 6
    same(iter(TrainingBatches(folder, PLAN, None)), iter(TrainingBatches(bucket, PLAN, None)), 400)  # more than an epoch
    middle = next(itertools.islice(TrainingBatches(folder, PLAN, None), 150, None)).position
    same(iter(TrainingBatches(folder, PLAN, middle)), iter(TrainingBatches(bucket, PLAN, middle)), 100)


def test_loader_workers_open_the_bucket_themselves(both: tuple[ParquetText, ParquetText]) -> None:
    folder, bucket = both
    loaded = order.training_loader(TrainingBatches(bucket, PLAN, None), DataLoaderConfig(num_workers=2), cuda=False)
    same(iter(TrainingBatches(folder, PLAN, None)), loaded, 60)


def test_training_from_a_bucket_has_the_losses_of_the_folder_and_evaluates_there(
    both: tuple[ParquetText, ParquetText], store: MlflowClient, tiny: Path
) -> None:
    folder, bucket = both
    for text, name in ((folder, "folder"), (bucket, "bucket")):
        settings = (f"dataset.parquet_dir={text.root}", f"tracking.experiment={name}", f"training.checkpoint_dir={name}")
        assert train(tiny, *settings).exit_code == 0
    runs = [only_run(store, name) for name in ("folder", "bucket")]
    for metric in ("train/loss", "val/loss"):
        here, there = (history(store, run.info.run_id, metric) for run in runs)
        assert here == there
        assert here
    (data, _) = runs[1].inputs.dataset_inputs
    assert (data.dataset.source_type, data.dataset.digest) == ("s3", folder.digest)
    resumed = train(tiny, f"dataset.parquet_dir={folder.root}", "training.max_iters=8", resume=runs[1].info.run_id)
    assert resumed.exit_code == 0, resumed.output  # it is the same text
    measured = run_cli("evaluate", "latest", "--config", str(tiny), "--data", str(bucket.root), "--no-log")
    assert f"on {bucket.root}" in measured.output


def test_store_that_is_killed_in_the_middle_costs_nothing_but_time(
    both: tuple[ParquetText, ParquetText], stores: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "READ_S", 120.0)  # it would wait an hour for a store that cannot be started again
    folder, bucket = both
    said = list[str]()
    told = ParquetText(DatasetConfig(parquet_dir=str(bucket.root), val_fraction=0.2), said.append)
    expected, got = iter(TrainingBatches(folder, PLAN, None)), iter(TrainingBatches(told, PLAN, None))
    same(expected, got, 5)
    stores.s3.signal(signal.SIGKILL)

    def restore() -> None:
        time.sleep(2)
        stores.s3.start()

    restoring = threading.Thread(target=restore)
    restoring.start()
    try:
        same(expected, got, 200)
    finally:
        restoring.join()
    lost, back = ([line for line in said if words in line] for words in ("does not answer", "answers again"))
    assert len(lost) == len(back), said  # none where the SDK's own repetitions were enough


def test_text_is_prepared_into_a_bucket_and_from_one(bucket: str, tmp_path: Path, stores: Team) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate(documents(20)):
        (tmp_path / "in" / f"{number:02}.txt").write_text(text)
    done = prepare(str(tmp_path / "in"), place_of(bucket), "text")
    assert (done.written.documents, done.written.files, str(done.folder)) == (20, 1, bucket)
    back = prepare(bucket, tmp_path / "out", "text")
    assert back.written.documents == 20
    assert pq.read_table(tmp_path / "out")["text"].to_pylist() == documents(20)
    with pytest.raises(DataError, match=r"not empty \(it holds part-00000.parquet\)"):
        prepare(str(tmp_path / "in"), place_of(bucket), "text")
    client = stores.s3.client()
    client.upload_file(str(tmp_path / "in" / "00.txt"), BUCKET, f"{bucket.rpartition('/')[2]}/texts/a.txt")
    assert prepare(f"{bucket}/texts/a.txt", tmp_path / "single", "text").written.documents == 1
    client.put_object(Bucket=BUCKET, Key=f"{bucket.rpartition('/')[2]}/{UNFINISHED}/{UNFINISHED}", Body=b"x")
    with pytest.raises(DataError, match="a preparation is writing here"):
        ParquetText(DatasetConfig(parquet_dir=bucket))


def test_preparation_that_fails_leaves_nothing_in_the_bucket(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("part-0.parquet", "missing.parquet")]
    files[0].write_bytes(b"x")
    with pytest.raises(DataError, match="No such file"):
        remote.upload(files, RemotePath(bucket), UNFINISHED)
    assert remote.list_files(RemotePath(bucket), lambda name: False) == []


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        (f"s3://{BUCKET}/nothing-here", "no such folder"),
        ("s3://no-such-bucket/x", "no such folder"),
        ("foo://a/b", "Unrecognized filesystem"),
    ],
)
def test_place_without_text_is_refused_at_once(bucket: str, uri: str, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(DataError, match=words):
        ParquetText(DatasetConfig(parquet_dir=uri))
    assert time.monotonic() - began < 10


def test_store_that_is_not_there_is_waited_for_a_while(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "START_S", 1.0)
    absent = f"s3://{BUCKET}/x?endpoint_override=127.0.0.1:1&scheme=http"
    with pytest.raises(DataError, match="no answer within 1 s"):
        ParquetText(DatasetConfig(parquet_dir=absent))


def test_store_is_asked_again_until_it_answers_or_refuses_and_both_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    said = list[str]()
    outcomes: list[Exception | str] = [OSError("curlCode: 7, could not connect"), OSError("HTTP status 503"), "text"]

    def ask() -> str:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    assert remote.patiently(ask, RemotePath("s3://b/x"), said.append, 60) == "text"
    assert [line.partition("(")[0] for line in said] == ["data: s3://b/x does not answer ", "data: s3://b/x answers again"]
    for refusal in (OSError("AWS Error ACCESS_DENIED during GetObject"), FileNotFoundError("s3://b/x"), ValueError("damaged")):
        outcomes[:] = [refusal, "text"]
        with pytest.raises(DataError, match=str(refusal)):
            remote.patiently(ask, RemotePath("s3://b/x"), said.append, 60)
    assert len(said) == 2


def test_configuration_keeps_the_uri_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM", "ours")
    config: Any = Config.from_dict({"dataset": {"parquet_dir": "s3://${TEAM}/text/", "source": "auto"}})
    assert config.dataset.parquet_dir == "s3://${TEAM}/text/"


def test_outage_that_several_readers_meet_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.05)
    said, up, met = list[str](), threading.Event(), threading.Barrier(3)

    def ask() -> str:
        if not up.is_set():
            met.wait(10)  # all have failed before one goes on
            up.set()
            raise OSError("curlCode: 7, could not connect")
        return "text"

    readers = [threading.Thread(target=remote.patiently, args=(ask, RemotePath("s3://b/y"), said.append, 60)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [line.partition("(")[0] for line in said] == ["data: s3://b/y does not answer ", "data: s3://b/y answers again"]
