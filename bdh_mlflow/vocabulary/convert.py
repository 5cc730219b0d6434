"""Any tokenizer as a tokenizer.json, which opens without this package: bytes, SentencePiece and tiktoken as what `tokenizers` runs.

What is made gives the same ids as the tokenizer itself; `tokenizer_json` compares them on text of many kinds and refuses where they differ.
Three things do: where a text spells out a control token or a byte piece of a SentencePiece model (`</s>`, `<0x41>`), `tokenizers` takes it
for that; in a vocabulary of bytes NUL, which is the separator, is left out of a text; decoding leaves out the space that encoding has put
first.
"""

import base64
import importlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from bdh_mlflow import vocabulary
from bdh_mlflow.errors import InputError
from bdh_mlflow.vocabulary.libraries import ENDS, byte_letters

PROBES = (
    "def f(self, x=1):\n    return self.x + x  # two  spaces\n\n\n",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600\u200d\U0001f469 \u00a0\u3000 \u0130\u00df",
    "  lead, 1234567 12,345.67 don't DON'T",
    "\t\ttabs\r\nlines\r\n",
    "<|endoftext|>[INST]",
    "x",
    "a" * 70,
)
"""Text of many kinds, on which both must agree."""


def tokenizer_json(own: "vocabulary.Tokenizer") -> bytes:
    """The file.   Raises InputError for a tokenizer that cannot be written so."""
    made = _MAKERS[own.kind](own)
    read = Tokenizer.from_str(made)
    read.encode_special_tokens = True
    for text in PROBES:
        if read.encode(text, add_special_tokens=False).ids != own.encode(text):
            raise InputError(f"its tokenizer ({own.kind}) cannot be written as tokenizer.json: {text!r} would get other tokens")
    return made.encode()


def separator_name(own: "vocabulary.Tokenizer") -> str:
    """What the token between documents is called in the file; byte 0, which no text holds, gets a name there."""
    return own.separator_text or ENDS[0]


def _of_bytes(own: "vocabulary.Tokenizer") -> str:
    letters = {byte: letter for letter, byte in byte_letters().items() if byte != own.separator}
    tokenizer = Tokenizer(models.BPE({separator_name(own): own.separator} | {letter: byte for byte, letter in letters.items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, {separator_name(own): own.separator})


def _of_huggingface(own: "vocabulary.Tokenizer") -> str:
    """The file itself, without what would add, cut or fill up tokens."""
    assert own.content is not None
    tree = json.loads(own.content)
    if (tree.get("post_processor") or {}).get("type") != "ByteLevel":
        tree["post_processor"] = None
    return json.dumps({**tree, "truncation": None, "padding": None}, ensure_ascii=False)


def _of_tiktoken(own: "vocabulary.Tokenizer") -> str:
    assert own.content is not None
    tree: Mapping[str, Any] = json.loads(own.content)
    ranks = {base64.b64decode(token): int(rank) for token, rank in tree["mergeable_ranks"].items()}
    letters = {byte: letter for letter, byte in byte_letters().items()}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spelled(a), spelled(b)) for a, b in (_halves(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    ]
    tokenizer = Tokenizer(models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(tree["pat_str"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer, tree["special_tokens"])


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that were joined into this one: what merging its bytes by all lower ranks leaves."""
    parts, rank = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
        lowest = min(range(len(joined)), key=joined.__getitem__)
        if joined[lowest] >= rank:
            raise InputError(f"its tokenizer (tiktoken) cannot be written as tokenizer.json: {token!r} is joined from no two tokens")
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]


def _of_sentencepiece(own: "vocabulary.Tokenizer") -> str:
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(own.content)
    trained, pieces = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
    if trained.model_type == 1:  # unigram
        model: Any = models.Unigram(pieces, trained.unk_id, trained.byte_fallback)
    else:
        numbers = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = [
            (number, piece[:cut], piece[cut:])
            for number, (piece, _) in enumerate(pieces)
            for cut in range(1, len(piece))
            if piece[:cut] in numbers and piece[cut:] in numbers
        ]
        merges.sort(key=lambda each: (-pieces[each[0]][1], numbers[each[1]], numbers[each[2]]))
        unknown = pieces[trained.unk_id][0]
        model = models.BPE(numbers, [each[1:] for each in merges], unk_token=unknown, fuse_unk=True, byte_fallback=trained.byte_fallback)
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if proto.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("\u2581"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    spaces = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*spaces, *([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else [])])
    return _with_special(tokenizer, {piece.piece: n for n, piece in enumerate(proto.pieces) if piece.type in (2, 3)})


def _with_special(tokenizer: Tokenizer, special: Mapping[str, int]) -> str:
    """Its JSON with these special tokens at these ids."""
    tree = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": number, "content": name, **flags} for name, number in sorted(special.items(), key=lambda each: each[1])]
    return json.dumps(tree, ensure_ascii=False)


_MAKERS = {"byte": _of_bytes, "huggingface": _of_huggingface, "tiktoken": _of_tiktoken, "sentencepiece": _of_sentencepiece}
