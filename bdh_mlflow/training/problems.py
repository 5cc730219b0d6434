"""What a configuration asks of this machine that it cannot do; asked before anything is built."""

from collections.abc import Iterable

from bdh_mlflow.config import Config, Problem
from bdh_mlflow.model import precision
from bdh_mlflow.training import optim


def problems(config: Config) -> Iterable[Problem]:
    """Number formats, optimizer and compilation that this machine or these versions cannot carry out."""
    yield from optim.problems(config)
    yield from precision.problems(config)
