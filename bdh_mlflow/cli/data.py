"""The group `bdh-mlflow data`: make parquet files of text, and look into them."""

import sys

import click

from bdh_mlflow.cli.common import DEFAULT_CONFIG, Launch, place, print_table
from bdh_mlflow.cli.output import console_on
from bdh_mlflow.config import Config
from bdh_mlflow.errors import DataError
from bdh_mlflow.files import shown
from bdh_mlflow.text import decode, printable

SHOWN_SKIPPED = 10


@click.group()
def data() -> None:
    """Prepare text for training, or inspect it."""


@data.command("prepare")
@click.argument("source")
@click.argument("folder")
@click.option("--column", default="text", show_default=True, help="Field or column of jsonl, json and parquet sources, and of the result.")
def data_prepare(source: str, folder: str, column: str) -> None:
    """Turn SOURCE into parquet files in FOLDER.

    SOURCE is python-stdlib (the sources of this Python), a txt, jsonl, json or parquet file, compressed or not, or a folder of them or of
    source code. FOLDER is a new or an empty folder. Both may be in a
    bucket (s3://BUCKET/PREFIX, gs://, abfs://).
    """
    from bdh_mlflow.data.prepare import prepare
    from bdh_mlflow.data.remote import place_of

    if not folder:
        raise DataError("FOLDER is empty text; name a folder, or . for the current one")
    source, folder, out = place(source), place(folder), console_on(sys.stderr)
    with out.status("reading") as status:
        done = prepare(source, place_of(folder), column, lambda n, size: status.update(f"{n:,} documents, {size / 1e6:,.1f} MB"))
    for name, reason in done.skipped[:SHOWN_SKIPPED]:
        click.echo(f"skipped {name}: {reason}")
    if len(done.skipped) > SHOWN_SKIPPED:
        click.echo(f"... and {len(done.skipped) - SHOWN_SKIPPED} more")
    click.echo(f"{shown(done.folder)}: {done.documents:,} documents, {done.bytes / 1e6:,.1f} MB of text in {done.files} files")
    click.echo(f"Next: {Launch.of_this_process().train(DEFAULT_CONFIG, {'dataset.parquet_dir': shown(done.folder)})}")


@data.command("inspect")
@click.argument("folder")
@click.option("--column", default="text", show_default=True, help="Column of the documents.")
@click.option("--val-fraction", default=0.01, show_default=True, help="Share of the documents kept for validation.")
def data_inspect(folder: str, column: str, val_fraction: float) -> None:
    """Show what the parquet files in FOLDER hold and how training would split them."""
    from bdh_mlflow.data.parquet import ParquetText

    tree = {"dataset": {"parquet_dir": place(folder), "text_column": column, "val_fraction": val_fraction}}
    text = ParquetText(Config.from_dict(tree, origin="options").dataset)
    first = text.row_groups[0]
    training, validation = text.training_bytes(first), text.validation_bytes(first)
    rows = [
        ["files", f"{len(text.files):,} ({text.bytes / 1e6:,.1f} MB)"],
        ["row groups", f"{len(text.row_groups):,}"],
        ["documents", f"{text.rows:,}"],
        ["digest", text.digest],
        ["first row group", f"{first.rows:,} documents, {len(training):,} training and {len(validation):,} validation bytes"],
        ["begins", decode(training[:200].tolist())],
    ]
    print_table(["", printable(text.root)], rows)
    if note := text.note():
        click.echo(note)
