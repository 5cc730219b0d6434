"""What is reported of text."""

import math

from bdh_mlflow.text import bits_per_byte


def test_a_uniform_guess_of_bytes_costs_eight_bits_each() -> None:
    assert math.isclose(bits_per_byte(math.log(256), 1.0), 8)


def test_a_token_of_four_bytes_costs_a_quarter_each() -> None:
    assert math.isclose(bits_per_byte(math.log(4096), 4.0), 3)
