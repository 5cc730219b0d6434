"""Small tokenizers of every library, made of the tests' made-up text."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bdh_mlflow.config import DatasetConfig
from bdh_mlflow.data.columns import TOKENIZER_KEY, TOKENS
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.vocabulary import BYTES, Tokenizer, of_content
from bdh_mlflow.vocabulary.learn import learn_bpe
from bdh_mlflow.vocabulary.libraries import tiktoken_content
from tests.conftest import documents, write_shards

SIZE = 280
KINDS = ("byte", "text", "tokens")
"""Whose tokens a folder gives: bytes, of its text when it is read, prepared beside it."""


@functools.cache
def bpe(size: int = SIZE) -> bytes:
    return learn_bpe(documents(200), size)


@functools.cache
def spaces_first(*, byte_fallback: bool = True) -> bytes:
    """A tokenizer.json in the manner of Llama's: spaces as U+2581, one put first, bytes for what is unknown."""
    tokenizer = HuggingFace(models.BPE(byte_fallback=byte_fallback, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps if byte_fallback else [steps[0], *steps[2:]])
    special = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)] * byte_fallback]
    tokenizer.train_from_iterator(documents(200), trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(tree).encode()


@functools.cache
def sentencepiece_model(**settings: Any) -> bytes:
    model = io.BytesIO()
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "model_type": "bpe"}
    lines = [line for text in documents(200) for line in text.split("\n") if line.strip()]
    options = {"vocab_size": 310, "minloglevel": 2, **plain, **settings}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


@functools.cache
def tiktoken_file() -> bytes:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in (b"re", b"tu", b"rn", b"retu", b"return", b"se", b"lf", b"self", b" d", b"ef", b" def"):
        ranks[word] = len(ranks)
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return tiktoken_content("made", pattern, ranks, {"<|endoftext|>": len(ranks)})


def wordpiece() -> bytes:
    tokenizer = HuggingFace(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "def": 2, "##x": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer.to_str().encode()


def of_bpe(separator: str | None = None) -> Tokenizer:
    return of_content("huggingface", bpe(), separator, "made.json")


def add_tokens(folder: Path, tokenizer: Tokenizer) -> None:
    """Put the tokens beside the text of every file, row groups as they are."""
    for path in folder.glob("*.parquet"):
        with pq.ParquetFile(path) as file:
            groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
        kind = pa.list_(pa.from_numpy_dtype(tokenizer.dtype))
        made = [
            group.append_column(TOKENS, pa.array([tokenizer.encode(t or "") for t in group["text"].to_pylist()], kind)) for group in groups
        ]
        schema = made[0].schema.with_metadata({TOKENIZER_KEY: str(tokenizer.digest)})
        with pq.ParquetWriter(path, schema) as out:
            for group in made:
                out.write_table(group.cast(schema), row_group_size=len(group))


def written(folder: Path, kind: str, texts: list[str], **layout: Any) -> None:
    """A folder of documents, with tokens where they are of the kind `tokens`."""
    write_shards(folder, texts, **layout)
    if kind == "tokens":
        add_tokens(folder, of_bpe())


def opened(folder: Path, kind: str, val_fraction: float = 0.0) -> ParquetText:
    """The documents of a folder as tokens of a kind."""
    return ParquetText(DatasetConfig(parquet_dir=str(folder), val_fraction=val_fraction), tokenizer=BYTES if kind == "byte" else of_bpe())
