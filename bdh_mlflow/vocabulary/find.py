"""Where the tokenizer of a configuration is: a file, a library's cache, or the copy beside a run's checkpoints."""

from pathlib import Path

from bdh_mlflow.config import TokenizerConfig
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.files import nearest, reason_of, shown
from bdh_mlflow.vocabulary.libraries import cached_huggingface, cached_tiktoken, kind_of_content
from bdh_mlflow.vocabulary.tokenizer import BYTES, FILE_NAMES, Tokenizer, of_content

LARGEST_FILE = 2**28  # bytes; no tokenizer is as large, and a checkpoint named by mistake is not read


def find(config: TokenizerConfig, run_dir: Path | None = None) -> Tokenizer:
    """The tokenizer of a configuration.   run_dir: of a run, whose copy is taken where it has the configured digest, and where `path` or
    `name` is not here.

    Raises ConfigError for one that is missing, of another kind, damaged, or not the one whose digest is configured.
    """
    if config.type == "byte":
        return BYTES
    kept = run_dir / FILE_NAMES[config.type] if run_dir is not None else None
    if config.digest is not None and kept is not None and kept.is_file():
        own = of_content(config.type, read(kept), config.separator, shown(kept))
        if own.digest == config.digest:
            return own
    try:
        where, content = _content(config)
    except ConfigError:
        if kept is None or not kept.is_file():
            raise
        where, content = shown(kept), read(kept)
    tokenizer = of_content(config.type, content, config.separator, where)
    if config.digest is not None and tokenizer.digest != config.digest:
        copy = f"; the run's own is {shown(kept)}: set tokenizer.path to it" if kept is not None and kept.is_file() else ""
        raise ConfigError(f"{where}: not the tokenizer of this run (digest {tokenizer.digest}, tokenizer.digest is {config.digest}){copy}")
    return tokenizer


def of_file(path: Path, separator: str | None = None) -> Tokenizer:
    """The tokenizer in a file or folder, of the kind that its contents tell.   Raises ConfigError."""
    file = _in_folder(path, None)
    content = read(file)
    kind = kind_of_content(content)
    if kind is None:
        raise ConfigError(f"{shown(file)}: no tokenizer; accepted: tokenizer.json, a SentencePiece model, or tiktoken's arguments as JSON")
    return of_content(kind, content, separator, shown(file))


def read(file: Path) -> bytes:
    """The bytes of a tokenizer's file.   Raises ConfigError."""
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"{shown(file)}: {size:,} bytes: no tokenizer")
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{shown(file)}: {reason_of(error)} (tokenizer.path)") from None


def missing(config: TokenizerConfig, run_dir: Path | None = None) -> Path | None:
    """The file that a tokenizer is to be trained into (`tokenizer.train_size`), as long as neither it nor a run's copy is there."""
    if config.train_size is None or config.path is None or Path(config.path).exists():
        return None
    return None if run_dir is not None and (run_dir / FILE_NAMES[config.type]).is_file() else Path(config.path)


def _content(config: TokenizerConfig) -> tuple[str, bytes]:
    """A name for messages, and the bytes of the file."""
    if config.path is not None:
        file = _in_folder(Path(config.path), config.type)
        return shown(file), read(file)
    assert config.name is not None, "a configuration without both is refused when it is read"
    cached = cached_huggingface if config.type == "huggingface" else cached_tiktoken
    return config.name, cached(config.name)


def _in_folder(path: Path, kind: str | None) -> Path:
    """The file itself, or the one in a folder that holds a tokenizer.   Raises ConfigError."""
    names = [FILE_NAMES[kind]] if kind else list(FILE_NAMES.values())
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise ConfigError(f"{shown(path)}: a folder without {' or '.join(names)} (tokenizer.path)")
    if not path.exists():
        beside = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside[:100]) if beside else ""
        raise ConfigError(f"{shown(path)}: no such file (tokenizer.path){hint if 'did you mean' in hint else ''}")
    return path
