"""A vocabulary learned from text."""

from bdh_mlflow.vocabulary import of_content
from bdh_mlflow.vocabulary.learn import learn_bpe
from tests.conftest import documents


def test_equal_texts_give_equal_bytes_and_the_size_that_was_asked_for() -> None:
    first, second = learn_bpe(documents(50), 280), learn_bpe(iter(documents(50)), 280)
    assert first == second
    assert of_content("huggingface", first, None, "f").size == 280


def test_a_text_with_fewer_pairs_gives_fewer_tokens() -> None:
    assert of_content("huggingface", learn_bpe(["ab ab"], 1000), None, "f").size == 259  # bytes, separator, ab and its space


def test_joined_tokens_are_shorter_than_bytes() -> None:
    own = of_content("huggingface", learn_bpe(documents(50), 280), None, "f")
    text = documents(1, seed=9)[0]
    assert len(own.encode(text)) < 0.7 * len(text)
