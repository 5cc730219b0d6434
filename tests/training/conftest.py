"""Configurations for several processes, and what one process leaves of them."""

from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from tests.conftest import TINY
from tests.training.together import PASSES, Left, curves, digests, put_away, train


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """The tiny configuration with four passes an update, and an odd number of validation batches."""
    path = tmp_path / "four.yaml"
    training = {**TINY["training"], "gradient_accumulation_steps": PASSES, "test_iters": 3}
    path.write_text(yaml.safe_dump({**TINY, "training": training}))
    return path


@pytest.fixture
def alone(store: MlflowClient, four: Path) -> Left:
    """What one process leaves; its run is put away."""
    result = train(four, 1)
    assert result.exit_code == 0, result.output
    found = digests(), curves(store)
    put_away(store)
    return found
