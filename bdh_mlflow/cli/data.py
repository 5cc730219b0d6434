"""The group `bdh-mlflow data`: make parquet files of text, make vocabularies, and look into both."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bdh_mlflow.cli.common import DEFAULT_CONFIG, Launch, place, print_table
from bdh_mlflow.cli.output import console_on
from bdh_mlflow.config import Config, DatasetConfig
from bdh_mlflow.errors import DataError, InputError
from bdh_mlflow.files import shown
from bdh_mlflow.text import printable

if TYPE_CHECKING:
    from bdh_mlflow.data.prepare import OnProgress
    from bdh_mlflow.data.shards import Written
    from bdh_mlflow.data.usage import Usage
    from bdh_mlflow.vocabulary import Tokenizer

SHOWN_SKIPPED = 10
SHOWN_TOKENS = 12  # longest and most frequent ones

tokenizer_option = click.option(
    "--tokenizer",
    "named",
    metavar="FILE",
    help="tokenizer.json, SentencePiece model, folder with one, huggingface:NAME or tiktoken:NAME.",
)
separator_option = click.option("--separator", help="Token between two documents; the one by which the tokenizer ends a text if not given.")
column_option = click.option("--column", default="text", show_default=True, help="Column of the documents.")
val_fraction_option = click.option("--val-fraction", default=0.01, show_default=True, help="Share of the documents kept for validation.")


@click.group()
def data() -> None:
    """Prepare text for training, or inspect it."""


@data.command("prepare")
@click.argument("source")
@click.argument("folder")
@click.option("--column", default="text", show_default=True, help="Field or column of jsonl, json and parquet sources, and of the result.")
@tokenizer_option
@separator_option
@click.option("--lossy", is_flag=True, help="Keep documents that the tokenizer does not give back exactly.")
@click.option(
    "--processes", type=click.IntRange(1), help="Processes that make tokens; if not given one for each core but the one that writes."
)
def data_prepare(source: str, folder: str, column: str, named: str | None, **making: Any) -> None:
    """Turn SOURCE into parquet files in FOLDER.

    SOURCE is python-stdlib (the sources of this Python), a txt, jsonl, json or parquet file, compressed or not, or a folder of them or of
    source code. FOLDER is a new or an empty folder. Both may be in a
    bucket (s3://BUCKET/PREFIX, gs://, abfs://).

    With --tokenizer the tokens are made now, once, and put beside the text. What was done when this is interrupted stays: the same command
    goes on.
    """
    from bdh_mlflow.data.prepare import prepare
    from bdh_mlflow.data.remote import place_of
    from bdh_mlflow.data.shards import Tokenizing

    if not folder:
        raise DataError("FOLDER is empty text; name a folder, or . for the current one")
    tokenizing = None
    if named is not None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        tokenizing = Tokenizing(_tokenizer(named, making["separator"]), making["processes"] or max(1, cores - 1), making["lossy"])
    elif any(making.values()):
        raise click.UsageError("--lossy, --separator and --processes are of --tokenizer")
    source, folder = place(source), place(folder)
    try:
        with _progress() as on_progress:
            done = prepare(source, place_of(folder), column, on_progress, tokenizing)
    except KeyboardInterrupt:
        if tokenizing is not None:
            click.echo("Interrupted; finished files are kept, the same command goes on behind them", err=True)
        raise
    for name, reason in done.skipped[:SHOWN_SKIPPED]:
        click.echo(f"skipped {name}: {reason}")
    if len(done.skipped) > SHOWN_SKIPPED:
        click.echo(f"... and {len(done.skipped) - SHOWN_SKIPPED} more")
    written, settings = done.written, {"dataset.parquet_dir": shown(done.folder)}
    settings |= {"dataset.text_column": printable(column)} if column != "text" else {}
    click.echo(f"{shown(done.folder)}: {_amount(written)} in {written.files} files")
    if tokenizing is not None and named is not None:
        kept = f"; {written.lossy:,} documents are not given back exactly" if written.lossy else "; every document is given back exactly"
        click.echo(f"{written.tokens:,} tokens, {written.bytes / max(1, written.tokens):.3f} bytes each{kept}")
        settings |= _settings(tokenizing.tokenizer, named, making["separator"]) | ({"tokenizer.lossy": "true"} if making["lossy"] else {})
    click.echo(f"Next: {Launch.of_this_process().train(DEFAULT_CONFIG, settings)}")


@data.command("inspect")
@click.argument("folder")
@column_option
@val_fraction_option
@tokenizer_option
@separator_option
def data_inspect(folder: str, column: str, val_fraction: float, named: str | None, separator: str | None) -> None:
    """Show what the parquet files in FOLDER hold and how training would split them."""
    from bdh_mlflow.data.parquet import ParquetText
    from bdh_mlflow.vocabulary import BYTES

    text = ParquetText(_dataset(folder, column, val_fraction), tokenizer=_tokenizer(named, separator) if named else BYTES, lossy=True)
    first = text.row_groups[0]
    training, validation = text.training_tokens(first), text.validation_tokens(first)
    unit = "tokens" if named else "bytes"
    rows = [
        ["files", f"{len(text.files):,} ({text.bytes / 1e6:,.1f} MB)"],
        ["row groups", f"{len(text.row_groups):,}"],
        ["documents", f"{text.rows:,}"],
        ["digest", text.digest],
        *([["tokens of", ", ".join(sorted(text.prepared_for))]] if text.prepared_for else []),
        ["first row group", f"{first.rows:,} documents, {len(training):,} training and {len(validation):,} validation {unit}"],
        ["begins", text.tokenizer.decode(training[:200].tolist())],
    ]
    print_table(["", printable(text.root)], rows)
    for note in text.notes():
        click.echo(note)


@data.command("vocabulary")
@click.argument("folder")
@click.option("--size", type=click.IntRange(1), help="Train a byte-level BPE of so many tokens.")
@click.option("--out", "-o", type=click.Path(dir_okay=False), help="File to write it to (tokenizer.json).")
@tokenizer_option
@separator_option
@column_option
@val_fraction_option
def data_vocabulary(folder: str, size: int | None, out: str | None, named: str | None, **how: Any) -> None:
    """Train a vocabulary on the training text in FOLDER, or look at what a given one makes of it.

    Shows bytes per token on training and validation text, how much of the vocabulary occurs, and its longest and most frequent tokens.
    """
    from bdh_mlflow.data.parquet import ParquetText
    from bdh_mlflow.data.usage import training_texts, usage
    from bdh_mlflow.files import atomic_write
    from bdh_mlflow.vocabulary.learn import LEAST, learn_bpe

    if (named is None) == (size is None) or (size is None) != (out is None):
        raise click.UsageError("give --size and --out to train one, or --tokenizer to look at one")
    if size is not None and size < LEAST:
        raise click.UsageError(f"--size {size}: at least {LEAST}: the 256 bytes, a separator and one token that joins two of them")
    val_fraction, separator = how["val_fraction"], how["separator"]
    dataset, status = _dataset(folder, how["column"], val_fraction), console_on(sys.stderr)
    if size is not None and out is not None:
        if Path(out).exists():
            raise InputError(f"--out {shown(out)}: there already; give another name or remove it first")
        if not Path(out).absolute().parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {Path(out).parent}")
        with status.status("training a vocabulary"):
            atomic_write(Path(out), learn_bpe(training_texts(ParquetText(dataset)), size))
        named = out
    assert named is not None, "one of the two was given"
    tokenizer = _tokenizer(named, separator)
    if size is not None and tokenizer.size < size:
        click.echo(f"The text gives {tokenizer.size:,} tokens, not {size:,}: no more pairs occur in it")
    text = ParquetText(dataset, tokenizer=tokenizer, lossy=True)
    with status.status("counting tokens"):
        training, validation = usage(text, validation=False), usage(text, validation=True) if val_fraction else None
    print_table(["", printable(named)], _described(tokenizer, training, validation))
    print_table(["longest", "bytes", "times", "most frequent", "share"], _tokens(tokenizer, training))
    if out is not None:
        click.echo(f"{shown(out)}: digest {tokenizer.digest}")
    settings = {"dataset.parquet_dir": shown(text.root), **_settings(tokenizer, named, separator)}
    click.echo(f"Next: {Launch.of_this_process().train(DEFAULT_CONFIG, settings)}")


@data.command("search")
@click.argument("pattern")
@click.argument("folder")
@column_option
@click.option("--ignore-case", "-i", is_flag=True, help="Capital and small letters are alike.")
@click.option("--context", default=40, show_default=True, type=click.IntRange(0), help="Bytes shown on either side of a match.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(0), help="Documents shown, each with its first match; 0: counts alone."
)
def data_search(pattern: str, folder: str, column: str, ignore_case: bool, context: int, limit: int) -> None:
    """Find a regular expression (RE2) in the documents of the parquet files in FOLDER.

    Shows the first match of each document with what stands around it, then how many there are.
    """
    from bdh_mlflow.data.parquet import ParquetText
    from bdh_mlflow.data.search import Pattern, search

    text, counts, total = ParquetText(_dataset(folder, column, 0.0)), dict[str, list[int]](), [0, 0, 0]
    for found in search(text, Pattern(pattern, ignore_case, context), limit):
        for hit in found.hits:
            place = click.style(f"{hit.file}:{hit.row}", fg="magenta")
            times = f" ({hit.times:,} times)" if hit.times > 1 else ""
            match = click.style(_one_line(hit.match), fg="red", bold=True)
            click.echo(f"{place}{times}: {_one_line(hit.before)}{match}{_one_line(hit.after)}")
        amounts = found.times, found.matching, found.documents
        counts[found.file] = [a + b for a, b in zip(counts.get(found.file, [0, 0, 0]), amounts, strict=True)]
        total = [a + b for a, b in zip(total, amounts, strict=True)]
    if len(counts) > 1:
        print_table(
            ["file", "matches", "documents with it", "documents"], [[name, *(f"{n:,}" for n in each)] for name, each in counts.items()]
        )
    click.echo(f"{total[0]:,} matches in {total[1]:,} of {total[2]:,} documents")


def _one_line(text: str) -> str:
    return printable(text.replace("\r", "\u240d").replace("\n", "\u2424").replace("\t", " "))


def _described(tokenizer: "Tokenizer", training: "Usage", validation: "Usage | None") -> list[list[str]]:
    held_out = [["bytes per token, validation text", f"{validation.bytes_per_token:.3f}"]] if validation and validation.tokens else []
    unused = int((training.counts == 0).sum())
    return [
        ["type", f"{tokenizer.kind}, separator {tokenizer.separator_text} ({tokenizer.separator})"],
        ["tokens", f"{tokenizer.size:,}"],
        ["bytes per token, training text", f"{training.bytes_per_token:.3f} ({training.bytes / 1e6:,.1f} MB counted)"],
        *held_out,
        ["coverage", f"{100 * training.coverage:.1f} % of the tokens occur, {unused:,} do not"],
    ]


def _tokens(tokenizer: "Tokenizer", training: "Usage") -> list[list[str]]:
    """Rows of the longest and the most frequent tokens, side by side."""
    longest = sorted(range(tokenizer.size), key=lambda token: (-len(tokenizer.pieces[token]), token))[:SHOWN_TOKENS]
    frequent = (-training.counts).argsort(kind="stable")[:SHOWN_TOKENS].tolist()
    return [
        [
            repr(tokenizer.decode([long])),
            str(len(tokenizer.pieces[long])),
            f"{training.counts[long]:,}",
            repr(tokenizer.decode([often])),
            f"{100 * training.counts[often] / max(1, training.tokens):.2f} %",
        ]
        for long, often in zip(longest, frequent, strict=True)
    ]


def _dataset(folder: str, column: str, val_fraction: float) -> DatasetConfig:
    tree = {"dataset": {"parquet_dir": place(folder), "text_column": column, "val_fraction": val_fraction}}
    return Config.from_dict(tree, origin="options").dataset


def _tokenizer(named: str, separator: str | None) -> "Tokenizer":
    """What --tokenizer names.   Raises ConfigError."""
    from bdh_mlflow.vocabulary import find

    kind, colon, name = named.partition(":")
    if colon and kind in ("huggingface", "tiktoken") and not Path(named).exists():
        tree = {"tokenizer": {"type": kind, "name": name, "separator": separator}}
        return find.find(Config.from_dict(tree, origin="--tokenizer").tokenizer)
    return find.of_file(Path(place(named)), separator)


def _settings(tokenizer: "Tokenizer", named: str, separator: str | None) -> dict[str, str]:
    """Settings of a training with it."""
    kind, _, name = named.partition(":")
    key, value = ("name", name) if kind in ("huggingface", "tiktoken") and not Path(named).exists() else ("path", named)
    settings = {"tokenizer.type": tokenizer.kind, f"tokenizer.{key}": printable(value), "model.vocab_size": "null"}
    return settings | ({"tokenizer.separator": separator} if separator else {})


def _amount(written: "Written") -> str:
    return f"{written.documents:,} documents, {written.bytes / 1e6:,.1f} MB of text"


@contextlib.contextmanager
def _progress() -> Iterator["OnProgress"]:
    """A bar with remaining time on a terminal; nothing in a file or pipe, where the last line says it all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console_on(sys.stderr), transient=True) as bar:
        task = bar.add_task("reading", total=1.0)

        def on_progress(written: "Written", share: float) -> None:
            tokens = f", {written.tokens:,} tokens" if written.tokens else ""
            bar.update(task, completed=share, description=f"{_amount(written)}{tokens}")

        yield cast("OnProgress", on_progress)
