"""Malformed input in numbers: settings, overrides, checkpoints, manifests, parquet files and journals, mutated from valid ones.

Each input is given to the room that reads it, and for settings and checkpoints to the command line as well. It must be read, or refused by
an error of this package with exit code 1 or 2; any other exception is a finding, and so is damage of a checkpoint that is not noticed.
The same seed gives the same inputs. `tests/test_fuzz.py` runs some thousand, `benchmarks/fuzz.py` as many as it is told.
"""

import dataclasses
import json
import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from click.testing import CliRunner

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import Provenance, RunDirectory
from bdh_mlflow.cli.main import cli
from bdh_mlflow.config import Config
from bdh_mlflow.data import validation
from bdh_mlflow.data.order import Order, TrainingBatches
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import BdhError
from bdh_mlflow.studies.space import Space
from bdh_mlflow.text import Evaluation
from bdh_mlflow.tracking import journal, records, segments
from bdh_mlflow.tracking.journal import Journal

EXIT_CODES = {0, 1, 2}
WORDS = (
    b"0", b"-1", b"1e400", b".nan", b"null", b"~", b"true", b"yes", b"007", b"0x1f", b"12:30", b"1_000", b"\xd9\xa3", b"9" * 400,
    b"!!binary aGk=", b"!!set {a}", b"!!python/name:os.system", b"&a", b"*a", b"<<: *a", b"{", b"}", b"[", b"]", b": ", b"- ", b"? ", b"'",
    b'"', b"|\n", b">-\n", b"\n", b"\t", b"#", b"---\n", b"...", b"[" * 1200, b"a" * 5000, b"\0", b"\xff", b"\xed\xb3\xa9", b"\\udce9",
    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"${HOME}", b"${NOT_SET}", b"~/x", b"../..", b"sqlite:///x.db", b"http://", b"file:x", b"mlruns",
    b"%2F", b"training", b"model", b"tracking", b"tags", b"NaN", b"Infinity",
)  # fmt: skip
Read = Callable[[Path, bytes], object]


class Finding(NamedTuple):
    """What went wrong with an input.   what: the last lines of a traceback, or a sentence."""

    kind: str
    number: int
    what: str
    content: bytes


@dataclass(frozen=True)
class Kind:
    """Inputs of one kind.   seeds: valid ones.   read: raises a BdhError for one that is refused, and anything else for a fault."""

    name: str
    seeds: tuple[bytes, ...]
    read: Read


class Accepted(AssertionError):
    """Damage that nobody noticed."""


def findings(kinds: list[Kind], folder: Path, count: int, seed: int, each: Callable[[str], None] = lambda kind: None) -> Iterator[Finding]:
    """Try `count` inputs, the kinds in turn.   folder: for the inputs.   each: called with the kind of every input that was tried."""
    for number in range(count):
        kind = kinds[number % len(kinds)]
        draw = random.Random(f"{seed}/{kind.name}/{number}")
        content = mutated(draw, draw.choice(kind.seeds), kind.seeds)
        try:
            kind.read(folder, content)
        except BdhError as error:
            if not str(error).strip():
                yield Finding(kind.name, number, "an error without a message", content)
        except Exception as error:  # the point of it
            lines = traceback.format_exception(error)
            yield Finding(kind.name, number, "".join(lines[-3:]).strip()[-800:], content)
        each(kind.name)


def mutated(draw: random.Random, content: bytes, others: tuple[bytes, ...]) -> bytes:
    """One to four changes: bits, bytes, words of the formats, pieces cut, moved, or taken from another input."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(content))
        end = min(len(content), at + draw.choice((1, 1, 2, 8, 64)))
        piece = content[at:end]
        match draw.randrange(8):
            case 0 if piece:
                piece = bytes([piece[0] ^ (1 << draw.randrange(8))]) + piece[1:]
            case 1:
                piece = b""
            case 2:
                piece = draw.randbytes(len(piece) or 1)
            case 3 | 4:
                piece = draw.choice(WORDS)
            case 5:
                piece += piece
            case 6:
                other = draw.choice(others)
                start = draw.randint(0, len(other))
                piece = other[start : start + draw.choice((1, 8, 64))]
            case 7 if draw.random() < 0.3:
                return content[:at]
        content = content[:at] + piece + content[end:]
    return content


def all_kinds(folder: Path) -> list[Kind]:
    """Every kind, with its valid inputs made in `folder`."""
    return [
        Kind("settings", _yaml_seeds(), _read_settings),
        Kind("override", tuple(_OVERRIDES), _read_override),
        Kind("space", (_SPACE,), _read_space),
        *_checkpoint_kinds(folder / "checkpoints"),
        Kind("parquet", _parquet_seeds(folder), _read_parquet),
        Kind("journal", (_journal_seed(),), _read_journal),
        Kind("delivered", (json.dumps(dataclasses.asdict(journal.Delivered(run_id="a", set_aside=[1]))).encode(),), _read_delivered),
        Kind("segments", (_SEGMENTS,), _read_segments),
    ]


_OVERRIDES = (
    b"training.max_iters=5", b"tracking.tags.team=a", b"tracking.tags={a: 1}", b"scheduler.type=cosine", b"dataset.parquet_dir=~/x",
    b"training.learning_rate=1e-3", b"tracking.tracking_uri=sqlite:///a.db", b"low_precision.optimizer_bits=8", b"training.compile=auto",
)  # fmt: skip
_SEGMENTS = b"""[{"segment": 1, "host": "h", "pid": 2, "device": "cpu", "versions": {"torch": "2"}, "started_at_ms": 1, "first_step": 0,
 "last_step": 3, "ended_at_ms": null, "last_seen_ms": 5, "reason": null, "downtime_s": 0.0, "mlflow_run": null}]"""
_SPACE = b"""study: s
parameters:
  training.learning_rate: {low: 1e-4, high: 1e-2, log: true}
  model.n_head: {choices: [1, 2]}
  training.batch_size: {low: 1, high: 4, step: 1}
settings: {training.max_iters: 4, tracking.run_name: 007}
"""


def _yaml_seeds() -> tuple[bytes, ...]:
    merge = b"training: &t\n  <<: {max_iters: 7}\n  batch_size: 2\nmodel: {n_layer: 1}\ntracking:\n  tags: {a: 1.10, b: on}\n"
    return Config().to_yaml().encode(), merge


def _read_settings(folder: Path, content: bytes) -> None:
    (folder / "a.yaml").write_bytes(content)
    _command("config", "show", "--config", str(folder / "a.yaml"))


def _read_override(folder: Path, content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")
    config = Config.from_dict({}, [text], base=folder)
    Config.from_dict(config.to_dict(), base=folder)


def _read_space(folder: Path, content: bytes) -> None:
    (folder / "space.yaml").write_bytes(content)
    Space.from_yaml(str(folder / "space.yaml"))


def _command(*words: str) -> None:
    result = CliRunner().invoke(cli, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code not in EXIT_CODES:
        raise Accepted(f"exit code {result.exit_code}: {result.output[-200:]}")


def _checkpoint_kinds(folder: Path) -> list[Kind]:
    """A checkpoint's own bytes, and its manifest's, each beside the other as it was saved."""
    run = RunDirectory.new(folder, {"config.yaml": b"seed: 1\n"}, datetime(2025, 11, 8, 14, 30, 22))
    state: dict[str, Any] = {"step": 7, "tokens_seen": 70, "loss": 2.5, "model_state_dict": {"encoder": torch.arange(64.0)}, "config": {}}
    saved = run.save(state, Provenance("a" * 32, 1, "c0ffee", True, "c", "d", {"torch": "2"}), None)
    run.close()
    weights, said = saved.path.read_bytes(), json.loads(saved.manifest_path.read_text())
    manifest = json.dumps({**said, "saved_at": "2025-11-08T14:30:22+01:00"}).encode()

    def place(weights: bytes, manifest: bytes) -> None:
        saved.path.write_bytes(weights)
        saved.manifest_path.write_bytes(manifest)

    def read_weights(folder: Path, content: bytes) -> None:
        place(content, manifest)
        newest, _ = checkpoint.newest(saved.path.parent)
        if newest is not None and content != weights:
            raise Accepted("damaged bytes are called a checkpoint")
        checkpoint.load(saved.path)

    def read_manifest(folder: Path, content: bytes) -> None:
        place(weights, content)
        listing = checkpoint.list_run(saved.path.parent)
        checkpoint.best(listing.checkpoints)
        checkpoint.by_last_save(saved.path.parent.parent)
        checkpoint.expired(saved.path.parent, 1, 10)
        _command("checkpoints", "verify", str(saved.path.parent))

    return [Kind("checkpoint", (weights,), read_weights), Kind("manifest", (manifest,), read_manifest)]


def _parquet_seeds(folder: Path) -> tuple[bytes, ...]:
    texts = [f"document {i} " * 20 for i in range(8)]
    tables = pa.table({"text": texts}), pa.table({"text": pa.array(texts).dictionary_encode(), "n": range(8)})
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=3, compression=("none", "zstd")[number])
    return tuple((folder / f"{number}.parquet").read_bytes() for number in range(len(tables)))


def _read_parquet(folder: Path, content: bytes) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "a.parquet").write_bytes(content)
    dataset = Config.from_dict({"dataset": {"parquet_dir": str(folder / "data"), "val_fraction": 0.2}}).dataset
    text = ParquetText(dataset)
    validation.drawn(text, 1, 2, 8)
    next(iter(TrainingBatches(text, Order(2, 2, 8, 1), None)))


def _journal_seed() -> bytes:
    segment = records.Segment(
        number=1, training="t", continues=None, wrapper=None, experiment="bdh", run_name=None, user="me", tracking_uri="u", mirror=True,
        keep=None, audit=["train/loss"], host="h", pid=1, device="cpu", versions={"torch": "2"}, started_at_ms=1, first_step=0,
    )  # fmt: skip
    written: list[records.JournalRecord] = [
        segment,
        records.Params(params={"a": "1"}),
        *(records.Points(values={"train/loss": 1.5, "optim/lr": 0.1}, step=step) for step in range(1, 4)),
        records.Text(artifact="a.txt", text="t", rows=[{"step": 1}]),
        records.CheckpointSaved(path="/c.pt", evaluation=Evaluation(3, 1.5, 2)),
        records.End(status="FINISHED", tags={"a": "b"}, step=3),
    ]
    return b"".join(json.dumps(records.to_line(record, 2), separators=(",", ":")).encode() + b"\n" for record in written)


def _read_journal(folder: Path, content: bytes) -> None:
    (folder / journal.FILE_NAME).write_bytes(content)
    with journal.reading(folder) as reader:
        assert reader is not None
        end = reader.index.update()
        for entry in (*reader.read(0, end), *reader.read_files(0, end)):
            json.dumps(records.to_line(entry.record, entry.at_ms))
        segments.table(reader.index.spans(), None, False)
        reader.index.waiting(journal.Delivered())
    again = Journal(folder)
    again.append(records.Points(values={"a": 1.0}, step=1))
    if again.close():
        raise Accepted("nothing can be appended")


def _read_delivered(folder: Path, content: bytes) -> None:
    (folder / journal.STATE_NAME).write_bytes(content)
    with journal.reading(folder) as reader:
        assert reader is not None
        reader.index.waiting(reader.delivered())


def _read_segments(folder: Path, content: bytes) -> None:
    try:
        written = json.loads(content)
    except (ValueError, RecursionError):
        written = None
    segments.table([], written, True)
