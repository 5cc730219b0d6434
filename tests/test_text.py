"""Bytes as tokens."""

import math

from bdh_mlflow.text import bits_per_byte, decode, encode


def test_text_survives_the_round_trip() -> None:
    assert decode(encode("naïve 🐉\n")) == "naïve 🐉\n"


def test_bytes_that_are_not_text_are_visible() -> None:
    assert decode([65, 0, 0xFF, 66, 300]) == "A\u2400\ufffdB\u2400"


def test_a_uniform_guess_costs_eight_bits_a_byte() -> None:
    assert math.isclose(bits_per_byte(math.log(256)), 8)
