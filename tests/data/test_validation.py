"""Windows of validation text: drawn, and in the order of the text."""

import itertools
from pathlib import Path

import torch

from bdh_mlflow.data import parquet, validation
from tests.conftest import documents, write_shards
from tests.data.test_parquet import opened


def test_validation_batches_are_windows_of_validation_text(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(80))
    text = opened(tmp_path, val_fraction=0.3)
    found = validation.drawn(text, batches=3, batch_size=4, block_size=8)
    assert [tuple(b.shape) for b in found] == [(4, 9)] * 3
    held_out = b"".join(text.validation_tokens(g).tobytes() for g in text.row_groups)
    assert bytes(found[0][1].tolist()) in held_out
    assert validation.drawn(opened(tmp_path, val_fraction=0.0), 1, 1, 8) == []


def test_validation_stream_is_validation_text_in_its_order(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(80))
    text = opened(tmp_path, val_fraction=0.3)
    found = validation.stream(text, batches=3, batch_size=4, block_size=8)
    assert [tuple(b.shape) for b in found] == [(4, 9)] * 3
    assert all(torch.equal(before[:, -1], after[:, 0]) for before, after in itertools.pairwise(found))
    rows = torch.cat([found[0], *(batch[:, 1:] for batch in found[1:])], dim=1)
    held_out = b"\0" + b"".join(
        text.validation_tokens(text.row_groups[g]).tobytes() for g in parquet.shuffled(len(text.row_groups), validation.ORDER, 0)
    )
    assert all(bytes(row) in held_out for row in rows.tolist())
    tokens = sum(len(text.validation_tokens(group)) for group in text.row_groups)
    assert [tuple(b.shape) for b in validation.stream(text, 10**6, 4, 8)] == [(1, 9)] * (tokens // 8), "reading on needs several windows"
    assert [tuple(b.shape) for b in validation.stream(text, 5, 10**6, 8)] == [(tokens // 8 // 5, 9)] * 5
    assert validation.stream(opened(tmp_path, val_fraction=0.0), 1, 1, 8) == []
