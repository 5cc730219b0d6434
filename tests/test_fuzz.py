"""Some thousand malformed inputs, always the same ones: each is read or refused in words. `benchmarks/fuzz.py` tries more."""

from collections import Counter
from pathlib import Path

from scripts.fuzz import all_kinds, findings

INPUTS = 2_200


def test_malformed_input_is_refused_in_words_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    tried: Counter[str] = Counter()
    found = list(findings(all_kinds(tmp_path), tmp_path, INPUTS, seed=15, each=lambda kind: tried.update([kind])))
    assert tried.total() == INPUTS
    assert min(tried.values()) > INPUTS // 12
    assert found == []
