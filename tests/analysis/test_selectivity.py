"""Which neurons tell two sets apart: known ones are found, and none of sets that do not differ."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bdh_mlflow.analysis import selectivity
from bdh_mlflow.errors import InputError
from tests.analysis import made


def test_correlation_and_correction_by_hand() -> None:
    of_first = np.array([True] * 10 + [False] * 10)
    values = np.zeros((20, 3))
    values[:, 0] = np.arange(20)[::-1]  # every sentence of the first set above every one of the second
    values[:, 1] = np.tile([0.0, 1.0], 10)
    tested = selectivity.compared(values, of_first)
    assert tested.r[0] == 1
    assert tested.r[1] == pytest.approx(0)
    assert np.isnan(tested.r[2]), "it never varies"
    assert tested.selective.tolist() == [True, False, False]


def test_a_neuron_of_one_letter_is_found_and_a_shuffled_one_is_not() -> None:
    model = made.model(width=16, multiplier=2)
    with torch.no_grad():
        model.encoder[0, :, 3] = model.embed.weight[65] - model.embed.weight[65].mean()
    draw = np.random.default_rng(0)
    ids = [draw.integers(97, 122, 30).tolist() for _ in range(24)]
    for sentence in ids[:12]:
        sentence[::2] = [65] * 15
    sets = selectivity.Sentences(("with A", "without"), (["x"] * 12, ["y"] * 12))
    found = selectivity.analyze(model, sets, ids, (0, 0), 0, {})
    assert "neurons (x)" in found.tables[1].rows[0]
    rows = {(row[0], row[1]): row for row in found.tables[1].rows}
    assert rows[("neurons (x)", "3")][2:] == ["+1.00", rows[("neurons (x)", "3")][3], "with A"]
    alike = [[draw.integers(97, 122, 30).tolist() for _ in range(24)] for _ in range(5)]
    nulls = [selectivity.analyze(model, sets, each, (0, 0), 0, {}).metrics["analysis/selective_x_l0h0"] for each in alike]
    assert nulls.count(0) >= 3, "each has a chance of 5 % for any"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [x, y]\nb: [z, w]\n", r"at least 8 sentences each.*found 'a': 2, 'b': 2"),
        ("a: [1, 2, 3, 4, 5, 6, 7, 8]\n", r"two lists .* found 'a': 8"),
        ("", "found nothing"),
        ("a: text\nb: [1]\n", "'a': no list, 'b': 1"),
        ("a:\nb: [1]\n", "'a': no list"),
        ('"": [1, 2, 3, 4, 5, 6, 7, 8]\nb: [1, 2, 3, 4, 5, 6, 7, 8]\n', "'': 8"),
        ("a: [x, [y]]\nb: [z]\n", r"'a', item 2: found .*; accepted: a sentence, as text"),
        ('a: [x, "\\ud83d"]\nb: [z]\n', r"'a', item 2: found .*; accepted: a sentence, as text"),
    ],
)
def test_files_that_are_no_two_lists_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(InputError, match=message):
        selectivity.read(tmp_path / "s.yaml")


def test_a_character_may_be_escaped_as_json_does(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(json.dumps({"a": ["\U0001f600"] * 8, "b": ["x"] * 8}))
    assert selectivity.read(tmp_path / "s.yaml").sets[0] == ["\U0001f600"] * 8


def test_a_sentence_that_is_a_book_is_refused() -> None:
    sets = selectivity.Sentences(("a", "b"), (["x"] * 8, ["y"] * 8))
    ids = [[65] * 9] * 3 + [[65] * 5000] + [[65] * 9] * 12
    with pytest.raises(InputError, match=r"sentence 4 of both sets has 5,000 tokens; at most 1,024"):
        selectivity.analyze(made.model(heads=1, multiplier=4), sets, ids, (0, 0), 0, {})


def test_neurons_that_are_always_active_are_no_candidates(tmp_path: Path) -> None:
    """And a name with a dollar sign is no formula."""
    model = made.model(heads=1, multiplier=4)
    with torch.no_grad():
        model.encoder.zero_()
    ids = np.random.default_rng(0).integers(97, 122, (16, 20)).tolist()
    sets = selectivity.Sentences(("$a_{$", "b$"), (["x"] * 8, ["y"] * 8))
    found = selectivity.analyze(model, sets, ids, (0, 0), 0, {"checkpoint": "run$_{$"})
    assert found.figure is not None
    assert "$a_{$ against b$" in found.figure
    assert found.metrics["analysis/selective_x_l0h0"] == 0


def test_sentences_are_read_as_they_are_written(tmp_path: Path) -> None:
    numbers = "[1, 007, 1.10, true, a, b, c, d]"
    (tmp_path / "s.yaml").write_text(f"first: {numbers}\nsecond: {numbers}\n")
    read = selectivity.read(tmp_path / "s.yaml")
    assert read.names == ("first", "second")
    assert read.sets[0][:4] == ["1", "007", "1.10", "true"]
