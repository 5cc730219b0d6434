"""Tokenizer files: what is read of them, switched off and refused."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, pre_tokenizers

from bdh_mlflow.errors import ConfigError, DataError
from bdh_mlflow.vocabulary import libraries, of_content
from tests.vocabulary import made


def changed(**parts: Any) -> bytes:
    return json.dumps({**json.loads(made.bpe()), **parts}).encode()


def with_model(**parts: Any) -> bytes:
    tree = json.loads(made.bpe())
    return json.dumps({**tree, "model": {**tree["model"], **parts}}).encode()


def test_truncation_and_padding_of_a_file_are_switched_off() -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    text = "def return self in for if"
    assert of_content("huggingface", changed(truncation=cut, padding=pad), None, "f").encode(text) == made.of_bpe().encode(text)


def test_a_post_processor_adds_nothing() -> None:
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    added = {"type": "TemplateProcessing", "single": template, "pair": [], "special_tokens": special}
    assert of_content("huggingface", changed(post_processor=added), None, "f").encode("def") == made.of_bpe().encode("def")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("huggingface", b"", "f: not a tokenizer of type huggingface: it is not JSON"),
        ("huggingface", b"[1]", "f: not a tokenizer of type huggingface: it is JSON, but no object"),
        ("huggingface", b'{"a": 1}', "f: not a tokenizer of type huggingface: it has no `model`"),
        ("huggingface", made.sentencepiece_model(), "it is one of type sentencepiece: set tokenizer.type: sentencepiece"),
        ("huggingface", made.tiktoken_file(), "it is one of type tiktoken: set tokenizer.type: tiktoken"),
        ("huggingface", made.bpe()[:-300], "not JSON"),
        ("huggingface", changed(model={"type": "BPE", "vocab": 3}), "f: damaged, or of a later version of `tokenizers`"),
        ("huggingface", with_model(dropout=0.1), "its BPE drops merges at random (dropout 0.1)"),
        ("huggingface", with_model(dropout="0.5"), "its BPE drops merges at random (dropout 0.5)"),
        ("huggingface", with_model(vocab={"a": 4_000_000_000}, merges=[]), "f: an id of 4,000,000,000: no vocabulary has as many tokens"),
        ("tiktoken", made.tiktoken_file().replace(b'"AA==": 0', b'"AA==": 4000000000'), "f: an id of 4,000,000,000"),
        ("huggingface", made.wordpiece(), "decoder WordPiece changes a token by its neighbours"),
        ("huggingface", changed(decoder=None), "there is no decoder"),
        ("huggingface", with_model(vocab={}, merges=[]), "f: no token stands for any text: an empty vocabulary"),
        ("sentencepiece", made.bpe(), "it is one of type huggingface: set tokenizer.type: huggingface"),
        ("sentencepiece", b"\nnonsense", "f: not a tokenizer of type sentencepiece"),
        ("sentencepiece", made.sentencepiece_model()[:500], "f: not a tokenizer of type sentencepiece"),
        ("tiktoken", made.bpe(), "it has no `name`; it is one of type huggingface"),
        ("tiktoken", b'{"name": "x", "pat_str": "x", "mergeable_ranks": {}, "special_tokens": {}}', "f: damaged: an empty vocabulary"),
        ("tiktoken", made.tiktoken_file().replace(b"pat_str", b"pattern"), "it has no `pat_str`"),
        ("tiktoken", made.tiktoken_file().replace(b"(?:", b"(??"), "f: damaged"),
        ("tiktoken", made.tiktoken_file().replace(b"AA==", b"A!=="), "f: damaged"),
    ],
)
def test_a_file_that_is_no_such_tokenizer_is_refused_with_what_it_is(kind: str, content: bytes, message: str) -> None:
    if "empty vocabulary" in message and kind == "huggingface":
        content = content.replace(b'"id": 0', b'"id": 0')  # the special token alone
    with pytest.raises(ConfigError) as refused:
        of_content(kind, content, None, "f")
    assert message in str(refused.value)


def test_the_kind_of_a_file_is_told_by_its_contents() -> None:
    found = [libraries.kind_of_content(c) for c in (made.bpe(), made.sentencepiece_model(), made.tiktoken_file(), b"{}", b"", b"[" * 10**5)]
    assert found == ["huggingface", "sentencepiece", "tiktoken", None, None, None]


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str) -> Any:
        if name in ("sentencepiece", "tiktoken"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    for kind in ("sentencepiece", "tiktoken"):
        with pytest.raises(ConfigError, match=rf"f: needs the package {kind}: pip install 'bdh-mlflow\[{kind}\]'"):
            of_content(kind, b"", None, "f")


def test_names_are_looked_up_in_the_caches_of_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match=r"not in Hugging Face's cache .* nothing is fetched .*: hf download team/made tokenizer.json"):
        libraries.cached_huggingface("team/made")
    with pytest.raises(ConfigError, match="no name of a repository"):
        libraries.cached_huggingface("a//b")
    with pytest.raises(ConfigError, match=r"not in tiktoken's cache .* tiktoken.get_encoding\('cl100k_base'\)"):
        libraries.cached_tiktoken("cl100k_base")
    with pytest.raises(ConfigError, match="no encoding of tiktoken; did you mean `cl100k_base`"):
        libraries.cached_tiktoken("cl100k")
    snapshot = tmp_path / "models--team--made" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes(made.bpe())
    (tmp_path / "models--team--made" / "refs").mkdir()
    (tmp_path / "models--team--made" / "refs" / "main").write_text("abc")
    assert libraries.cached_huggingface("team/made") == made.bpe()


def unigram_without_unknown() -> bytes:
    pieces = [("<|endoftext|>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("b", -2.0)]
    tokenizer = HuggingFace(models.Unigram(pieces))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer.to_str().encode()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("huggingface", unigram_without_unknown()),
        ("tiktoken", json.dumps({**json.loads(made.tiktoken_file()), "mergeable_ranks": {"YQ==": 0, "Yg==": 1}}).encode()),
    ],
    ids=["an Exception", "a panic of its Rust"],
)
def test_whatever_a_library_raises_for_a_text_is_one_error(kind: str, content: bytes) -> None:
    own = of_content(kind, content, "<|endoftext|>", "f")
    assert own.decode(own.encode("ab")).strip() == "ab"
    with pytest.raises(DataError, match="f: this tokenizer cannot encode a text: "):
        own.encode("#")


def test_a_byte_order_mark_is_no_damage() -> None:
    assert of_content("huggingface", b"\xef\xbb\xbf" + made.bpe(), None, "f").size == made.SIZE
