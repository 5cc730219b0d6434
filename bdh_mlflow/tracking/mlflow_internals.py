"""What this package uses of MLflow beyond its documented interface, so that an update of MLflow is checked in one place.

Each function here has a test that fails when MLflow changes what it relies on.
"""

import contextlib
import os
from collections.abc import Iterator

from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved, _validate_model_name


def check_model_name(name: str) -> None:
    """Raises MlflowException for a name that no registered model can have, with no request to a store."""
    _validate_model_name(name)


def check_model_alias(alias: str) -> None:
    """Raises MlflowException for an alias that no model version can have (`latest`, `v1`, odd characters), with no request to a store."""
    _validate_model_alias_name(alias)  # type: ignore[no-untyped-call]
    _validate_model_alias_name_reserved(alias)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def default_store(uri: str) -> Iterator[None]:
    """Make `uri` the process's default tracking store in the body, by its environment variable.

    For `MlflowClient.create_model_version` with a source `models:/ID` on a database: MLflow's SqlAlchemyStore looks the model up with a
    client of the default store, not of itself (a TODO there, 3.17.2).
    """
    before = os.environ.get(MLFLOW_TRACKING_URI.name)
    os.environ[MLFLOW_TRACKING_URI.name] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ[MLFLOW_TRACKING_URI.name]
        else:
            os.environ[MLFLOW_TRACKING_URI.name] = before
