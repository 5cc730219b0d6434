"""Where the tokenizer of a configuration is looked for."""

from pathlib import Path
from typing import Any

import pytest

from bdh_mlflow.config import TokenizerConfig
from bdh_mlflow.errors import ConfigError
from bdh_mlflow.vocabulary import BYTES
from bdh_mlflow.vocabulary.find import find, missing, of_file
from tests.vocabulary import made


def config(path: Path, **settings: Any) -> TokenizerConfig:
    return TokenizerConfig(**{"type": "huggingface", "path": str(path), **settings})


def test_bytes_need_nothing() -> None:
    assert find(TokenizerConfig()) is BYTES


def test_a_file_or_the_folder_that_holds_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(made.bpe())
    assert find(config(tmp_path)).digest == find(config(tmp_path / "tokenizer.json")).digest == made.of_bpe().digest
    assert of_file(tmp_path).kind == "huggingface"
    with pytest.raises(ConfigError, match=r"a folder without tokenizer.model"):
        find(config(tmp_path, type="sentencepiece"))


def test_a_missing_file_names_the_one_that_is_spelled_alike(tmp_path: Path) -> None:
    (tmp_path / "english.json").write_bytes(made.bpe())
    with pytest.raises(ConfigError, match=r"englisch.json: no such file \(tokenizer.path\); did you mean `english.json`\?"):
        find(config(tmp_path / "englisch.json"))


def test_the_copy_of_a_run_serves_where_the_file_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(made.bpe())
    assert find(config(Path("/elsewhere/x.json")), tmp_path).digest == made.of_bpe().digest


def test_the_copy_of_a_run_is_taken_where_the_file_has_become_another(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(made.bpe(270))
    (tmp_path / "tokenizer.json").write_bytes(made.bpe())
    assert find(config(tmp_path / "x.json", digest=str(made.of_bpe().digest)), tmp_path).size == made.SIZE
    assert find(config(tmp_path / "x.json"), tmp_path).size == 270, "as configured, whatever a run has"


def test_another_file_than_the_one_configured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(made.bpe(270))
    (tmp_path / "tokenizer.json").write_bytes(made.bpe(275))
    with pytest.raises(
        ConfigError, match=r"x.json: not the tokenizer of this run .*; the run's own is .*tokenizer.json: set tokenizer.path"
    ):
        find(config(tmp_path / "x.json", digest=str(made.of_bpe().digest)), tmp_path)


def test_a_file_is_to_be_trained_as_long_as_it_is_nowhere(tmp_path: Path) -> None:
    wanted = config(tmp_path / "new.json", train_size=300)
    assert missing(wanted) == tmp_path / "new.json"
    assert missing(config(tmp_path / "new.json")) is None
    (tmp_path / "tokenizer.json").write_bytes(made.bpe())
    assert missing(wanted, tmp_path) is None
    (tmp_path / "new.json").write_bytes(made.bpe())
    assert missing(wanted) is None


def test_a_file_that_is_no_tokenizer_is_not_read_into_memory_or_is_named(tmp_path: Path) -> None:
    huge = tmp_path / "checkpoint.pt"
    with huge.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ConfigError, match="1,073,741,824 bytes: no tokenizer"):
        find(config(huge))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"a.txt: no tokenizer; accepted: tokenizer.json, a SentencePiece model"):
        of_file(tmp_path / "a.txt")
