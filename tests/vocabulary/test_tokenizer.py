"""Text to ids and back, whatever the library: what ids stand for, what is refused, what travels between processes."""

import pickle

import numpy as np
import pytest

from bdh_mlflow.errors import ConfigError
from bdh_mlflow.vocabulary import BYTES, Tokenizer, of_content, tokenizer
from tests.conftest import documents
from tests.vocabulary import made

FILES = {
    "byte": None,
    "huggingface": made.bpe,
    "llama": made.spaces_first,
    "sentencepiece": made.sentencepiece_model,
    "tiktoken": made.tiktoken_file,
}
TEXTS = [
    "def return self",
    "  two  spaces \n\n\tand tabs ",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f600",
    "",
    "x" * 100,
    "<|endoftext|></s>",
    " lead",
]


@pytest.fixture(params=FILES, ids=str)
def own(request: pytest.FixtureRequest) -> Tokenizer:
    make = FILES[request.param]
    return BYTES if make is None else of_content("huggingface" if request.param == "llama" else request.param, make(), None, "file")


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_stand_for_the_bytes_of_the_text(own: Tokenizer, text: str) -> None:
    """Some libraries put a space before it. A text that spells a special token out is text."""
    ids = own.encode(text)
    assert own.decode(ids) in (text, " " + text)
    assert "".join(own.stream(ids)) == own.decode(ids)
    assert own.separator not in ids
    assert list(own.losses([text], own.encode_all([text]))) == []
    assert own.bytes_of(np.array(ids, np.int64)) == len(own.decode(ids).encode())


def test_several_texts_are_encoded_as_one_by_one(own: Tokenizer) -> None:
    encoded = own.encode_all(TEXTS)
    assert encoded.ids.dtype == own.dtype == (np.uint8 if own is BYTES else np.uint16)
    assert np.split(encoded.ids, encoded.lengths.cumsum()[:-1])[2].tolist() == own.encode(TEXTS[2])
    assert encoded.lengths.tolist() == [len(own.encode(text)) for text in TEXTS]


def test_the_separator_counts_as_one_byte_and_stands_for_no_text(own: Tokenizer) -> None:
    assert own.bytes_of(np.array([own.separator] * 3)) == 3
    assert own.decode([own.separator, own.size, own.size + 70_000]) == "\u2400" * 3


def test_another_process_gets_the_same_tokenizer(own: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(own))
    assert (again.digest, again.separator, again.pieces) == (own.digest, own.separator, own.pieces)
    assert again.encode(TEXTS[2]) == own.encode(TEXTS[2])


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(UnicodeEncodeError):
        made.of_bpe().encode("\ud83d")
    assert BYTES.encode("\udcff") == [255], "a byte of a command line that is not UTF-8"


def test_a_character_is_streamed_when_its_tokens_are_complete() -> None:
    own = made.of_bpe()
    pieces = list(own.stream(own.encode("\U0001f600!")))
    assert "".join(pieces) == "\U0001f600!"
    assert pieces[0] == ""


def test_bytes_that_are_not_text_are_visible() -> None:
    assert BYTES.decode([65, 0, 0xFF, 66, 300]) == "A\u2400\ufffdB\u2400"


@pytest.mark.parametrize(
    ("content", "text", "lost"),
    [
        (made.spaces_first(byte_fallback=False), "def \u65e5", "gives ' def"),
        (made.sentencepiece_model(remove_extra_whitespaces=True), "def  return", "for 'def  return' it gives ' def return' back"),
        (made.sentencepiece_model(normalization_rule_name="nmt_nfkc_cf"), "Def", "for 'Def' it gives ' def' back"),
    ],
    ids=["unknown characters", "spaces", "upper case"],
)
def test_text_that_is_not_given_back_is_told(content: bytes, text: str, lost: str) -> None:
    own = of_content("huggingface" if content[:1] == b"{" else "sentencepiece", content, None, "file")
    (told,) = own.losses([text, "x"], own.encode_all([text, "x"]))
    assert lost in told


def test_long_texts_are_encoded_in_parts_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(documents(50)) + "x" * 300
    monkeypatch.setattr(tokenizer, "CUT_CHARACTERS", 100)
    for kind, content in (("huggingface", made.bpe()), ("tiktoken", made.tiktoken_file()), ("sentencepiece", made.sentencepiece_model())):
        own = of_content(kind, content, None, "file")
        assert own.decode(own.encode(text)).removeprefix(" ") == text


def test_the_separator_is_found_or_named() -> None:
    assert made.of_bpe().separator_text == "<|endoftext|>"
    assert of_content("sentencepiece", made.sentencepiece_model(), None, "file").separator_text == "</s>"
    own = of_content("sentencepiece", made.sentencepiece_model(), "<s>", "file")
    assert (own.separator_text, own.separator) == ("<s>", 1)
    with pytest.raises(ConfigError, match=r"made.json: no token `<eot>` \(tokenizer.separator\)"):
        made.of_bpe("<eot>")
    tree = made.bpe().replace(b"<|endoftext|>", b"<|stop|>")
    with pytest.raises(ConfigError, match="none of its tokens is known to end a text"):
        of_content("huggingface", tree, None, "file")
    assert of_content("huggingface", tree, "<|stop|>", "file").separator == 0
