"""The command `analyze`: what a trained network does, as tables, figures, and artifacts of its run."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from bdh_mlflow.cli.common import config_option, ema_option, load_model, place, print_table, read_config, text_for
from bdh_mlflow.errors import InputError, TrackingError
from bdh_mlflow.files import reason_of, shown


@click.command()
@click.argument("run")
@config_option
@click.option("--only", multiple=True, metavar="NAME", help="activity, repetition, graph, synapses or selectivity; repeatable.")
@click.option("--data", "folder", metavar="DIR", help="Folder of parquet files with the text; the one it was trained on if not given.")
@click.option("--text", "text_file", type=click.Path(), help="Text file over which synapses are watched; validation text if not given.")
@click.option("--sentences", "sentences_file", type=click.Path(), help="YAML file of two lists of sentences that selectivity compares.")
@click.option("--layer", type=int, help="Layer whose synapses are looked at, from 0; the middle one if not given.")
@click.option("--head", type=int, default=0, show_default=True, help="Head whose synapses are looked at, from 0.")
@click.option("--words", default=32, show_default=True, type=click.IntRange(8, 4096), help="Random words of the repetition probe.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of random words, graphs and sets.")
@click.option("--out", default="analysis", show_default=True, type=click.Path(file_okay=False), help="Folder for figures and numbers.")
@ema_option
@click.option("--log/--no-log", default=True, show_default=True, help="Also store them in the MLflow run, under analysis/.")
def analyze(run: str, config_path: str, only: tuple[str, ...], ema: bool, log: bool, **asked: Any) -> None:
    """See what the network of RUN does: its activity, its graph of neurons, its synapses.

    RUN is given as for `generate`. Figures (SVG) and numbers (JSON) are written to a folder and stored in the run, where `compare` finds
    them; the numbers that compare over steps and runs are metrics there.
    """
    from bdh_mlflow.analysis import plan as analysis
    from bdh_mlflow.analysis import selectivity
    from bdh_mlflow.data import validation
    from bdh_mlflow.data.parquet import ParquetText
    from bdh_mlflow.studies import analyses

    sentences = None if asked["sentences_file"] is None else selectivity.read(Path(asked["sentences_file"]))
    text = None if asked["text_file"] is None else _read(Path(asked["text_file"]))
    out = Path(place(asked["out"]))
    names = tuple(dict.fromkeys(only)) or (*analysis.Plan().names, *["selectivity"] * (sentences is not None))
    analysis.check_names(names, sentences)
    loaded = load_model(run, config_path, ema)
    of_text = [name for name in names if name == "activity" or (name == "synapses" and text is None)]
    folder = asked["folder"]
    if of_text and not only and folder is None and not loaded.config.dataset.val_fraction:
        click.echo(f"its training kept no text for validation, so there is no {' and no '.join(of_text)}; --data DIR names text", err=True)
        names, of_text = tuple(name for name in names if name not in of_text), []
    plan = analysis.Plan(names, asked["words"], asked["seed"], asked["layer"], asked["head"], text, sentences)
    windows = []
    if of_text:
        corpus = ParquetText(text_for(loaded, folder, config_path), tokenizer=loaded.tokenizer, lossy=loaded.config.tokenizer.lossy)
        training = loaded.config.training
        windows = validation.drawn(corpus, training.test_iters, training.batch_size, training.block_size)
    made_of = {"checkpoint": f"{loaded.path.parent.name}/{loaded.path.name}", "step": loaded.step}
    subject = analysis.Subject(loaded.model, loaded.tokenizer, windows, made_of)
    plan, done = analysis.checked(plan, subject), []
    _write({}, out)  # what cannot be written is known before anything is computed
    for found in analysis.findings(subject, plan):
        for table in found.tables:
            click.echo(f"\n{found.name}: {table.title}")
            print_table(table.header, table.rows)
        click.echo(f"{found.says[0].upper()}{found.says[1:]}.")
        if ema:
            found = dataclasses.replace(found, name=f"{found.name}_ema", metrics={f"{k}_ema": v for k, v in found.metrics.items()})
        _write(found.files(loaded.step), out)
        done.append(found)
    click.echo(f"\nFigures: {', '.join(f'{shown(out)}/{found.name}/step_{loaded.step}.svg' for found in done)}")
    if log and loaded.run_id is not None:
        try:
            for found in done:
                analyses.log(found, loaded.run_id, loaded.step, read_config(config_path).tracking)
        except TrackingError as error:
            raise TrackingError(f"{error}. The figures are in {shown(out)}; --no-log asks no store") from error
        click.echo(f"Stored in run {loaded.run_id} under analysis/; compare: bdh-mlflow compare {loaded.run_id} OTHER")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: cannot be read as text: {reason_of(error) if isinstance(error, OSError) else error}") from None
    if not text.strip():
        raise InputError(f"--text {path}: there is no text in it")
    return text


def _write(files: dict[str, str], out: Path) -> None:
    """Write the files of an analysis, whose paths begin with the folder that they have in a run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            file = out / Path(*Path(path).parts[1:])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: {error.filename or out} cannot be written: {reason_of(error)}") from None
