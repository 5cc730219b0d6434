"""Files of tokenizers as their libraries write them: `tokenizers` (tokenizer.json), SentencePiece (.model), tiktoken.

Each becomes a `Library`: the bytes of text that each id stands for, and a function that encodes. What is not a pure function of the text is
switched off or refused: truncation, padding, dropout, special tokens that a text spells out.
"""

import base64
import contextlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_mlflow.errors import ConfigError, DataError
from bdh_mlflow.files import first_line, nearest

ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
"""Names under which tokenizers have a token that ends a text."""
NO_LOG = 4  # SentencePiece writes to standard error what it raises as well
MOST_IDS = 2**24  # a list of as many is made of the ids
BOM = b"\xef\xbb\xbf"
TIKTOKEN_KEYS = ("name", "pat_str", "mergeable_ranks", "special_tokens")


@dataclass(frozen=True)
class Library:
    """A tokenizer of a library.

    pieces: bytes of text by id, empty for special tokens.   encode: ids of each text.   find: id of the token of a name, None if there is
    none.   separators: names to look for between documents.   joins: texts encoded one by one give the same back as encoded together.
    """

    pieces: Sequence[bytes]
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    find: Callable[[str], int | None]
    separators: Sequence[str]
    joins: bool


def huggingface(content: bytes, where: str) -> Library:
    """A tokenizer.json.   Raises ConfigError for another file, and where its tokens do not stand for bytes of text."""
    import tokenizers

    tree = _json(content, where, "huggingface")
    if not isinstance(tree.get("model"), Mapping):
        raise _other_kind(content, where, "huggingface", "it has no `model`")
    if tree["model"].get("dropout") not in (None, 0):
        raise ConfigError(f"{where}: its BPE drops merges at random (dropout {tree['model']['dropout']}), so texts have no fixed tokens")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.removeprefix(BOM).decode())
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{where}: damaged, or of a later version of `tokenizers`: {first_line(error)}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # a text that spells `<|endoftext|>` out is text
    vocabulary, added = tokenizer.get_vocab(True), tokenizer.get_added_tokens_decoder()
    bytes_of = _bytes_by_decoder(tree.get("decoder"), where)
    _check_highest(max(vocabulary.values(), default=-1), where)
    pieces = [b""] * (1 + max(vocabulary.values(), default=-1))
    for token, number in vocabulary.items():
        pieces[number] = bytes_of(token) if number not in added else b"" if added[number].special else token.encode()
    unknown = tree["model"].get("unk_token")
    if unknown in vocabulary:
        pieces[vocabulary[unknown]] = b""  # stands for text that is lost

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        with _reported(where):
            return [each.ids for each in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    joins = "ByteLevel" in [step.get("type") for step in _steps(tree.get("decoder"))] and not _prefixes(tree.get("pre_tokenizer"))
    return Library(pieces, encode, tokenizer.token_to_id, ENDS, joins)


def sentencepiece(content: bytes, where: str) -> Library:
    """A SentencePiece model.   Raises ConfigError for another file, and without the package."""
    library = _optional("sentencepiece", where)
    if content[:1] != b"\n":
        raise _other_kind(content, where, "sentencepiece", "it is no SentencePiece model")
    try:
        library.set_min_log_level(NO_LOG)
        processor = library.SentencePieceProcessor(model_proto=content)
        count = processor.get_piece_size()
    except Exception as error:  # the library raises RuntimeError and others
        raise _other_kind(content, where, "sentencepiece", f"it is no SentencePiece model, or damaged: {first_line(error)}") from None

    def piece(number: int) -> bytes:
        text: str = processor.id_to_piece(number)
        if processor.is_control(number) or processor.is_unused(number) or processor.is_unknown(number):
            return b""
        return bytes([int(text[3:5], 16)]) if processor.is_byte(number) else text.replace("\u2581", " ").encode()

    def find(name: str) -> int | None:
        number: int = processor.piece_to_id(name)
        return number if 0 <= number < count and processor.id_to_piece(number) == name else None

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        with _reported(where):
            ids: Sequence[Sequence[int]] = processor.encode(list(texts), out_type=int)
        return ids

    own = [processor.id_to_piece(number) for number in (processor.eos_id(), processor.bos_id()) if number >= 0]
    return Library([piece(number) for number in range(count)], encode, find, (*own, *ENDS), joins=False)


def tiktoken(content: bytes, where: str) -> Library:
    """The arguments of `tiktoken.Encoding` as JSON, ranks by token in base64 (see `tiktoken_content`).   Raises ConfigError."""
    library, tree = _optional("tiktoken", where), _json(content, where, "tiktoken")
    if missing := [key for key in TIKTOKEN_KEYS if key not in tree]:
        raise _other_kind(content, where, "tiktoken", f"it has no `{missing[0]}`")
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in tree["mergeable_ranks"].items()}
        special = {str(name): int(number) for name, number in tree["special_tokens"].items()}
        if not ranks:
            raise ValueError("an empty vocabulary")
        _check_highest(max((*ranks.values(), *special.values())), where)
        encoding = library.Encoding(str(tree["name"]), pat_str=str(tree["pat_str"]), mergeable_ranks=ranks, special_tokens=special)
        pieces = [b""] * (1 + max((*ranks.values(), *special.values())))
        for token, rank in ranks.items():
            pieces[rank] = token
        encoding.encode_ordinary("a")
    except (KeyboardInterrupt, ConfigError):
        raise
    except BaseException as error:  # what the library's Rust raises is no Exception
        raise ConfigError(f"{where}: damaged: {first_line(error)}") from None

    def find(name: str) -> int | None:
        return special.get(name, ranks.get(name.encode()))

    def encode(texts: Sequence[str]) -> Sequence[Sequence[int]]:
        with _reported(where):
            return [encoding.encode_ordinary(text) for text in texts]

    return Library(pieces, encode, find, ENDS, joins=True)


LIBRARIES: dict[str, Callable[[bytes, str], Library]] = {
    "huggingface": huggingface,
    "sentencepiece": sentencepiece,
    "tiktoken": tiktoken,
}


def kind_of_content(content: bytes) -> str | None:
    """Which `tokenizer.type` a file is of; None for no tokenizer that is known."""
    if content[:1] == b"\n":
        return "sentencepiece"
    try:
        tree = json.loads(content.removeprefix(BOM))
    except (ValueError, RecursionError):
        return None
    if isinstance(tree, Mapping) and "mergeable_ranks" in tree:
        return "tiktoken"
    return "huggingface" if isinstance(tree, Mapping) and isinstance(tree.get("model"), Mapping) else None


def cached_huggingface(name: str) -> bytes:
    """The tokenizer.json of a repository of Hugging Face, from the cache on this machine.   Raises ConfigError if it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        file = hf_hub_download(name, "tokenizer.json", local_files_only=True)
    except HFValidationError as error:
        raise ConfigError(f"tokenizer.name: {name}: no name of a repository of Hugging Face: {first_line(error)}") from None
    except (EntryNotFoundError, OSError):
        raise ConfigError(
            f"tokenizer.name: {name}: its tokenizer.json is not in Hugging Face's cache on this machine, and nothing is fetched for a "
            f"training. Fetch it once: hf download {name} tokenizer.json; or set tokenizer.path to a file"
        ) from None
    with open(file, "rb") as opened:  # noqa: PTH123 - a path of the library's own kind
        return opened.read()


def cached_tiktoken(name: str) -> bytes:
    """An encoding of tiktoken by its name, from tiktoken's cache on this machine, as `tiktoken` reads it.   Raises ConfigError."""
    _optional("tiktoken", f"tokenizer.name: {name}")
    load: Any = importlib.import_module("tiktoken.load")
    known: Mapping[str, Callable[[], Mapping[str, Any]]] = importlib.import_module("tiktoken_ext.openai_public").ENCODING_CONSTRUCTORS
    if name not in known:
        raise ConfigError(f"tokenizer.name: {name}: no encoding of tiktoken{nearest(name, known)}")

    class NotCachedError(Exception):
        pass

    def refuse(url: str) -> bytes:
        raise NotCachedError

    fetch, load.read_file = load.read_file, refuse
    try:
        found = known[name]()
    except NotCachedError:
        raise ConfigError(
            f"tokenizer.name: {name}: not in tiktoken's cache on this machine, and nothing is fetched for a training. Fetch it once, with "
            f"TIKTOKEN_CACHE_DIR set to a folder that stays: python -c \"import tiktoken; tiktoken.get_encoding('{name}')\""
        ) from None
    finally:
        load.read_file = fetch
    return tiktoken_content(name, found["pat_str"], found["mergeable_ranks"], found["special_tokens"])


def tiktoken_content(name: str, pattern: str, ranks: Mapping[bytes, int], special_tokens: Mapping[str, int]) -> bytes:
    """The arguments of a `tiktoken.Encoding` as the file that `tiktoken` reads: equal arguments, equal bytes."""
    by_rank = {base64.b64encode(token).decode(): rank for token, rank in sorted(ranks.items(), key=lambda each: each[1])}
    tree = dict(zip(TIKTOKEN_KEYS, (name, pattern, by_rank, dict(special_tokens)), strict=True))
    return json.dumps(tree, indent=0).encode()


@contextlib.contextmanager
def _reported(where: str) -> Iterator[None]:
    """Whatever a library raises for a text, as one DataError; what its Rust raises is no Exception, and cannot be pickled."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise DataError(f"{where}: this tokenizer cannot encode a text: {first_line(error)}") from None


def _check_highest(highest: int, where: str) -> None:
    if highest >= MOST_IDS:
        raise ConfigError(f"{where}: an id of {highest:,}: no vocabulary has as many tokens (accepted: below {MOST_IDS:,})")


def _steps(part: Any) -> list[Mapping[str, Any]]:
    """The steps of a decoder or pre-tokenizer, sequences flattened."""
    if not isinstance(part, Mapping):
        return []
    inner = part.get("decoders") or part.get("pretokenizers")
    return [step for each in inner for step in _steps(each)] if isinstance(inner, list) else [part]


def _prefixes(pre_tokenizer: Any) -> bool:
    return any(step.get("add_prefix_space") for step in _steps(pre_tokenizer))


def _bytes_by_decoder(decoder: Any, where: str) -> Callable[[str], bytes]:
    """What the decoder of a tokenizer.json makes of one token, whatever its neighbours.   Raises ConfigError where they matter."""
    kinds = [str(step.get("type")) for step in _steps(decoder)]
    if not kinds or (odd := [kind for kind in kinds if kind not in ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")]):
        found = f"decoder {odd[0]} changes a token by its neighbours" if kinds else "there is no decoder"
        raise ConfigError(
            f"{where}: its tokens do not stand for bytes of text each ({found}), so text cannot be written as it is generated, and bits "
            f"per byte are not defined; accepted: byte-level tokenizers, and those with spaces as \u2581"
        )
    if "ByteLevel" in kinds:
        table = byte_letters()
        return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
    replaced = [
        (step["pattern"]["String"], step["content"]) if step["type"] == "Replace" else (step["replacement"], " ")
        for step in _steps(decoder)
        if step["type"] == "Metaspace" or (step["type"] == "Replace" and "String" in step.get("pattern", {}))
    ]

    def bytes_of(token: str) -> bytes:
        if "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x"):
            with contextlib.suppress(ValueError):
                return bytes([int(token[3:5], 16)])
        for old, new in replaced:
            token = token.replace(old, new)
        return token.encode()

    return bytes_of


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE spells each byte: itself if it can be seen, else one from U+0100 on (GPT-2, encoder.py)."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _json(content: bytes, where: str, kind: str) -> Mapping[str, Any]:
    try:
        tree = json.loads(content.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise _other_kind(content, where, kind, f"it is not JSON: {first_line(error)}") from None
    if not isinstance(tree, Mapping):
        raise _other_kind(content, where, kind, "it is JSON, but no object")
    return tree


def _other_kind(content: bytes, where: str, kind: str, reason: str) -> ConfigError:
    found = kind_of_content(content)
    hint = f"; it is one of type {found}: set tokenizer.type: {found}" if found not in (None, kind) else ""
    return ConfigError(f"{where}: not a tokenizer of type {kind}: {reason}{hint}")


def _optional(package: str, where: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{where}: needs the package {package}: pip install 'bdh-mlflow[{package}]'") from None
