"""What is trained on: the tokenizer and the text of a configuration, each made first where the configuration says of what."""

import dataclasses
import shlex
from pathlib import Path

from bdh_mlflow.config import Config, DatasetConfig, resolve
from bdh_mlflow.data import prepare, usage
from bdh_mlflow.data.folder import REFUSED, held, kind_of, list_files, nearest_folder
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.data.remote import RemotePath, place_of
from bdh_mlflow.data.sources import PYTHON_STDLIB, listed
from bdh_mlflow.distributed import Report, World
from bdh_mlflow.errors import ConfigError, DataError
from bdh_mlflow.files import atomic_write, reason_of, shown
from bdh_mlflow.text import printable
from bdh_mlflow.training.parts import Progress
from bdh_mlflow.vocabulary import BYTES, Tokenizer
from bdh_mlflow.vocabulary.find import find, missing
from bdh_mlflow.vocabulary.learn import learn_bpe


def with_tokenizer(config: Config, run_dir: Path | None, progress: Progress) -> tuple[Config, Tokenizer]:
    """The tokenizer, trained first if it is missing and `train_size` says so; and the configuration with what the tokenizer settles.

    run_dir: of the run that goes on, where a copy of its tokenizer is. Raises ConfigError, where they contradict each other too.
    """
    if config.tokenizer.type == "byte":
        return with_vocabulary_size(config), BYTES
    if (file := missing(config.tokenizer, run_dir)) is not None:
        _train(file, config, progress)
    tokenizer = find(config.tokenizer, run_dir)
    if run_dir is not None and config.tokenizer.path is not None and not Path(config.tokenizer.path).exists():
        progress.note(f"{shown(config.tokenizer.path)} (tokenizer.path) is not here: taking the copy in {shown(run_dir)}")
    if config.tokenizer.train_size not in (None, tokenizer.size):
        progress.note(f"the tokenizer has {tokenizer.size:,} tokens; tokenizer.train_size is for a file that is missing")
    settled = dataclasses.replace(config.tokenizer, digest=tokenizer.digest, separator=tokenizer.separator_text)
    return dataclasses.replace(_sized(config, tokenizer.size), tokenizer=settled), tokenizer


def with_vocabulary_size(config: Config) -> Config:
    """The configuration with the size that its tokenizer has, or will have once it is trained; for what needs no more of it.

    Raises ConfigError as `with_tokenizer` does.
    """
    settings = config.tokenizer
    if settings.type == "byte":
        return _sized(config, config.vocab_size)
    return _sized(config, settings.train_size if missing(settings) and settings.train_size else find(settings).size)


def _sized(config: Config, tokens: int) -> Config:
    size = config.model.vocab_size
    if size is not None and size < tokens:
        named = config.tokenizer.name or shown(config.tokenizer.path or "")
        raise ConfigError(f"model.vocab_size: {size:,} is less than the {tokens:,} tokens of the tokenizer {named}; null follows it")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size or tokens))


def _train(file: Path, config: Config, progress: Progress) -> None:
    """Train the tokenizer that is missing, on the training text."""
    text = open_text(resolve(config).config, BYTES, progress)
    size = config.tokenizer.train_size
    assert size is not None, "why it is trained"
    progress.note(f"{shown(file)} does not exist: training a tokenizer of {size:,} tokens on the training text (tokenizer.train_size)")
    content = learn_bpe(usage.training_texts(text), size)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, content)
    except OSError as error:
        raise ConfigError(f"tokenizer.path: {shown(file)}: cannot be written: {reason_of(error)}") from None


def open_together(config: Config, tokenizer: Tokenizer, progress: Progress, world: World) -> ParquetText:
    """The data on each rank; where it is built from its source, by one process at a time.   Raises DataError where it is not the same."""
    text = None
    for turn in (world.rank == 0, world.local_rank == 0, True):
        with world.failing():
            if turn and text is None:
                text = open_text(config, tokenizer, progress)
        world.exchange(Report())
    assert text is not None
    for rank, digest in enumerate(world.gather(text.digest)):
        if digest != text.digest:
            raise DataError(
                f"dataset.parquet_dir: {shown(text.root)} holds other text for {world.name(rank)} (digest {digest[:12]}) than for "
                f"{world.name(world.rank)} ({text.digest[:12]}); every process must read the same files"
            )
    return text


def open_text(config: Config, tokenizer: Tokenizer, progress: Progress) -> ParquetText:
    """The data, built from its source first if the folder is missing or empty.   config: resolved. Raises DataError."""
    if config.dataset.source is not None:
        _fill(config.dataset, config.dataset.source, progress)
    text = ParquetText(config.dataset, progress.note, tokenizer=tokenizer, lossy=config.tokenizer.lossy)
    for note in text.notes():
        progress.note(note)
    return text


def _fill(dataset: DatasetConfig, source: str, progress: Progress) -> None:
    """Build the folder from its source, unless there is something in it.

    Raises DataError for a folder whose name looks misspelt: training on other text than meant is worse than a question.
    """
    folder = place_of(dataset.parquet_dir)
    name = shown(folder)
    if isinstance(folder, RemotePath):  # a bucket has no folders, so an empty one is none
        if list_files(folder, lambda name: False, progress.note).files:
            return
        what = "is empty"
    elif (found := kind_of(folder)) == "folder":
        if held(folder):
            return
        what = "is empty"
    elif found == "nothing":
        what = "does not exist"
        near = nearest_folder(folder, REFUSED)
        if near is not None and (folder.absolute(), source) != (Path(DatasetConfig().parquet_dir).absolute(), PYTHON_STDLIB):
            raise DataError(
                f"{name}: no such folder (dataset.parquet_dir); did you mean {shown(near)}? "
                f"To build {name} beside it, run: bdh-mlflow data prepare {shlex.join([printable(source), name])}"
            )
    else:
        return
    progress.note(f"{name} {what}: preparing it from {shown(source)} (dataset.source)")
    done = prepare.prepare(source, folder, dataset.text_column)
    progress.note(f"prepared {done.written.documents:,} documents, {done.written.bytes / 1e6:.1f} MB of text{listed(done.skipped)}")
