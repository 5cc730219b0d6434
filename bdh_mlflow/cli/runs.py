"""Commands about one trained run and its delivery: evaluate, generate, sync, doctor."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from bdh_mlflow.cli.common import DEFAULT_CONFIG, Launch, config_option, ema_option, load_model, place, print_table, read_config, text_for
from bdh_mlflow.errors import InputError, TrackingError
from bdh_mlflow.files import reason_of, shown, target_of

if TYPE_CHECKING:
    from bdh_mlflow.inference.generate import Loaded, Sampling
    from bdh_mlflow.inference.memory import Memory


@click.command()
@click.argument("runs", nargs=-1, required=True)
@config_option
@click.option(
    "--data", "folders", multiple=True, metavar="DIR", help="Folder of parquet files, repeatable; the one it was trained on if not given."
)
@click.option("--batches", type=click.IntRange(1), help="Validation batches to use; as many as the training used if not given.")
@ema_option
@click.option("--carry", is_flag=True, help="Read windows one after the other, with the state of those before (training.carry_state).")
@click.option("--log/--no-log", default=True, show_default=True, help="Log the result to the MLflow run, under eval/.")
def evaluate(runs: tuple[str, ...], config_path: str, folders: tuple[str, ...], ema: bool, log: bool, **how: Any) -> None:
    """Measure the loss of RUNS on validation text.

    Prints it also in bits per byte, and logs both to the MLflow run of each if it has one. Runs are given as for `generate`. The losses of
    several, or on several folders, stand in one table.
    """
    from bdh_mlflow.inference import load

    names = [Path(folder).name for folder in folders]
    if log and (twice := next((name for name in names if names.count(name) > 1), None)):
        raise click.UsageError(f"--data: several folders are called {twice}, and would be logged as one; rename one, or give --no-log")
    one, rows = len(runs) == 1 and len(folders) < 2, []
    for run in runs:
        loaded = load_model(run, config_path, ema)
        row = [f"{shown(loaded.path)}, step {loaded.step}"]
        for folder in folders or (None,):
            dataset = text_for(loaded, folder, config_path)
            batches = how["batches"] or loaded.config.training.test_iters
            measured = load.validation_loss(loaded, dataset, batches, carry=how["carry"])
            row.append(f"{measured.loss:.4f} ({measured.bits_per_byte:.4f})")
            if one:
                click.echo(f"{loaded.path}: step {loaded.step}")
                kind = "_carried" * how["carry"]
                losses = f"val/loss{kind} {measured.loss:.4f} nats per token, val/bpb{kind} {measured.bits_per_byte:.4f}"
                click.echo(f"{losses} on {dataset.parquet_dir}")
                if measured.alone is not None:
                    click.echo(f"val/loss_stream {measured.alone:.4f}: the same windows, each read alone")
            if log and loaded.run_id is not None:
                names = load.record(loaded, measured, read_config(config_path).tracking, "_carried" * how["carry"] + "_ema" * ema)
                click.echo(f"Logged to run {loaded.run_id} as {' and '.join(names)}", err=not one)
        rows.append(row)
    if not one:
        print_table(
            [f"val/loss{'_carried' * how['carry']} in nats per token (bits per byte) on", *(folders or ("the text of its training",))], rows
        )


@click.command()
@click.argument("run")
@config_option
@click.option("--prompt", "prompts", multiple=True, help="Text to continue; - reads standard input. Repeated: several in one batch.")
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(1), help="Tokens to generate.")
@click.option("--temperature", default=0.8, show_default=True, type=click.FloatRange(0), help="0 always takes the likeliest token.")
@click.option("--top-k", default=50, show_default=True, type=click.IntRange(1), help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Sample among the likeliest tokens whose probabilities sum to this (nucleus sampling).",
)
@click.option("--stop", default="", help="Text after which generation ends.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of the sampling; the same seed gives the same text.")
@ema_option
@click.option("--state", metavar="FILE", help="Go on after the text that --save-state has kept there, as if it stood before the prompt.")
@click.option("--save-state", metavar="FILE", help="Keep what the model remembers of the text, prompt and what it writes, in a file.")
@click.option("--interactive", is_flag=True, help="Read one prompt per line until the end of input (Ctrl-D).")
def generate(run: str, config_path: str, prompts: tuple[str, ...], max_new_tokens: int, interactive: bool, **how_to: Any) -> None:
    """Continue a prompt with the model of RUN.

    RUN is latest, a path, a run id, RUN:N for its step N, an exported file, models:/NAME@ALIAS or another artifact URI. Without --prompt
    the prompt is read from standard input if something is piped into it, else it is empty.
    """
    from bdh_mlflow.inference import generate

    kept = _Kept(how_to.pop("state"), how_to.pop("save_state"))
    if (interactive or len(prompts) > 1) and any(kept):
        raise click.UsageError("--state and --save-state are of one text: they go with one --prompt, and not with --interactive")
    kept.check()
    if interactive and prompts:
        raise click.UsageError("--interactive asks for prompts itself; give it without --prompt")
    if prompts.count("-") > 1:
        raise click.UsageError("standard input can be one --prompt only")
    ema, sampling = how_to.pop("ema"), how_to
    if any(value != value for value in sampling.values()):
        raise click.UsageError("--temperature and --top-p must be numbers")
    how = generate.Sampling(**sampling)
    reads = interactive or "-" in prompts or not prompts
    if reads and (sys.stdin is None or sys.stdin.closed):  # `<&-`
        raise click.UsageError("standard input is closed; give --prompt TEXT")
    if interactive:
        _converse(load_model(run, config_path, ema), max_new_tokens, how)
        return
    piped = not prompts and not sys.stdin.isatty()
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts or ("-" if piped else "",)]
    loaded = load_model(run, config_path, ema)
    if len(texts) > 1:
        for text, written in zip(texts, generate.write_all(loaded, texts, max_new_tokens, how), strict=True):
            click.echo(f"{text}{written}\n")
        return
    memory = kept.read(loaded)
    _stream(loaded, texts[0], max_new_tokens, how, memory)
    if memory is not None:
        kept.write(loaded, memory, run, ema=ema)


class _Kept(NamedTuple):
    """Files of a model's state: to go on from, and to write."""

    source: str | None
    target: str | None

    def check(self) -> None:
        """Raises InputError for a file that cannot be written."""
        if self.target is None:
            return
        try:
            folder = target_of(Path(place(self.target))).parent
        except OSError as error:
            raise InputError(f"--save-state {self.target}: cannot be written: {reason_of(error)}") from None
        if not folder.is_dir():
            raise InputError(f"--save-state {self.target}: there is no folder {shown(folder)}")
        if not os.access(folder, os.W_OK):
            raise InputError(f"--save-state {self.target}: cannot be written: no permission to write in {shown(folder)}")

    def read(self, loaded: "Loaded") -> "Memory | None":
        from bdh_mlflow.inference import memory

        if self.source is not None:
            return memory.read(Path(place(self.source)), loaded.model)
        return memory.Memory.fresh(loaded.model) if self.target is not None else None

    def write(self, loaded: "Loaded", read: "Memory", run: str, *, ema: bool) -> None:
        from bdh_mlflow.inference import memory

        if self.target is None:
            return
        average = ", the average of its weights" * ema
        memory.write(Path(place(self.target)), read, loaded.model, f"{shown(loaded.path)}, step {loaded.step}{average}")
        again = f"bdh-mlflow generate {shlex.quote(run)}{' --ema' * ema} --state {shlex.quote(self.target)} --prompt TEXT"
        click.echo(f"State after {read.tokens:,} tokens: {self.target}. Go on: {again}", err=True)


def _converse(loaded: "Loaded", max_new_tokens: int, how: "Sampling") -> None:
    """Continue each line of input until it ends. Every prompt is independent of the ones before.

    A line that is `settings` shows how it is sampled, with `name=value` pairs behind it changes that; `reset` takes the changes back.
    """
    click.echo(
        f"{loaded.path}, step {loaded.step}. Each line is a prompt; `settings` shows how it is continued, `settings temperature=0.5 "
        f"top_k=20` changes it, `reset` takes that back; Ctrl-D ends.",
        err=True,
    )
    first = max_new_tokens, how
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        word, _, rest = prompt.partition(" ")
        if prompt == "reset" or word == "settings":
            try:
                max_new_tokens, how = first if word == "reset" else _changed(max_new_tokens, how, rest)
            except InputError as error:
                click.echo(f"Error: {error}", err=True)
            shown_now = {"max_new_tokens": max_new_tokens, **dataclasses.asdict(how)}
            click.echo("  ".join(f"{name}={value}" for name, value in shown_now.items()), err=True)
            continue
        try:
            _stream(loaded, prompt, max_new_tokens, how)
        except InputError as error:
            click.echo(f"Error: {error}", err=True)


def _changed(max_new_tokens: int, how: "Sampling", text: str) -> "tuple[int, Sampling]":
    """Settings after `name=value` pairs of a line.   Raises InputError for one that is not taken."""
    accepted: dict[str, Callable[[str], Any]] = {"temperature": float, "top_k": int, "top_p": float, "seed": int, "stop": str}
    for pair in shlex.split(text):
        name, equals, value = pair.partition("=")
        if not equals or name not in (*accepted, "max_new_tokens"):
            raise InputError(f"{pair}: accepted: {', '.join(f'{each}=...' for each in (*accepted, 'max_new_tokens'))}")
        try:
            number = None if value == "none" else accepted.get(name, int)(value)
        except ValueError:
            raise InputError(f"{name}: {value}; accepted: a number, or none") from None
        if name == "max_new_tokens":
            if number is None or number < 1:
                raise InputError(f"max_new_tokens: {value}; accepted: 1 or more")
            max_new_tokens = number
        else:
            changed: dict[str, Any] = {name: number}
            how = dataclasses.replace(how, **changed)
    return max_new_tokens, how


def _stream(loaded: "Loaded", prompt: str, max_new_tokens: int, how: "Sampling", memory: "Memory | None" = None) -> None:
    """Print the prompt and each piece of text as it is generated; nothing if the prompt is refused."""
    from bdh_mlflow.inference import generate

    pieces = generate.write(loaded, prompt, max_new_tokens, how, memory)
    click.echo(prompt, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False))
@config_option
@click.option("--tracking-uri", help="Store to deliver to; the one the training was meant for if not given.")
@click.pass_context
def sync(ctx: click.Context, folder: str | None, config_path: str, tracking_uri: str | None) -> None:
    """Send to MLflow what an ended run could not.

    Delivers the journal in FOLDER, or those of all runs under the checkpoint directory. What has arrived before is not sent again. Exit
    code 1 if something is still undelivered.
    """
    from bdh_mlflow.tracking import journal, sync

    if folder is not None:
        folders = [Path(folder)]
        if not (folders[0] / journal.FILE_NAME).is_file():
            raise InputError(f"{folder}: no {journal.FILE_NAME} in this folder; name a run directory")
    else:
        folders = sync.folders_with_journal(Path(read_config(config_path).training.checkpoint_dir))
    left = 0
    for waiting in folders:
        try:
            done = sync.sync(waiting, tracking_uri, lambda text: click.echo(text, err=True))
        except (TrackingError, OSError, ValueError) as error:  # other journals may go to another store
            click.echo(f"{waiting}: {error}", err=True)
            left += 1
        else:
            click.echo(f"{waiting}: {done.words}")
            left += done.left
    again = [
        *ctx.command_path.split(),
        *([folder] if folder else []),
        *(["--config", config_path] if config_path != DEFAULT_CONFIG else []),
    ]
    click.echo(f"{len(folders)} journals, {left} records left" + (f"; try again: {shlex.join(again)}" if left else ""))
    if left:
        ctx.exit(1)


@click.command()
@config_option
@click.pass_context
def doctor(ctx: click.Context, config_path: str) -> None:
    """Check that this setup works.

    Says where runs are logged, whether they arrive and can be viewed, and what this machine can run. Changes nothing. Exit code 1 if
    something is wrong. Started by torchrun, it also says what each process sees and how fast it reaches the others.
    """
    from bdh_mlflow.cli.doctor import GROUP_HEADER, examine, examine_group, group_table
    from bdh_mlflow.training import processes

    ranks = []
    if processes.launched():
        with processes.joined() as world:
            ranks = examine_group(world)
            if world.rank:
                return
    findings = examine(read_config(config_path))
    print_table(["", "found", "do"], [[f.what, f"{f.found}{'' if f.good else '  <- '}", f.do] for f in findings])
    wrong = [f.what for f in findings if not f.good]
    if ranks:
        print_table(GROUP_HEADER, group_table(ranks))
        wrong += [f"rank {number}" for number, rank in enumerate(ranks) if not rank.trains_with(ranks[0])]
    if wrong:
        click.echo(f"Problems: {', '.join(wrong)}")
        ctx.exit(1)
    click.echo(f"No problems. Next: {Launch.of_this_process().train(config_path, {})}")
