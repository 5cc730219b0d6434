"""The model that MLflow serves: text in, text out. MLflow executes this file itself ("models from code") next to a copy of the package."""

import threading
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from bdh_mlflow.errors import InputError
from bdh_mlflow.inference import generate, requests
from bdh_mlflow.inference.generate import Loaded, Sampling
from bdh_mlflow.inference.requests import UNSET_SEED
from bdh_mlflow.tracking.mlflow_internals import check_requests

WEIGHTS = "weights"
TEXT = "text"


class BDHText(PythonModel):
    """Continues each prompt.   Requests are answered one at a time, as one uses all cores already."""

    def __init__(self) -> None:
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()

    def load_context(self, context: PythonModelContext) -> None:
        """Read the exported file among the model's artifacts."""
        self._loaded = generate.from_file(Path(context.artifacts[WEIGHTS]))
        check_requests()

    def check_request(self, body: bytes | str, content_type: str | None) -> None:
        """Called by the scoring server with a request as it was sent.   Raises MlflowException (HTTP 400) for what it would misread."""
        try:
            requests.check(body, content_type)
        except InputError as error:
            raise _refusal(error) from None

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """The continuations of a column of prompts.   Raises MlflowException INVALID_PARAMETER_VALUE (HTTP 400) for an invalid request."""
        assert self._loaded is not None, "MLflow calls load_context first"
        count, sampling = parse_parameters(params or {})
        try:
            prompts = requests.texts(model_input[requests.PROMPT])
            with self._lock:
                return generate.write_all(self._loaded, prompts, count, sampling) if prompts else []
        except InputError as error:
            raise _refusal(error) from None


def parse_parameters(params: dict[str, Any]) -> tuple[int, Sampling]:
    """Number of tokens and sampling of a request; parameters not given have DEFAULTS.   Raises MlflowException for one out of range."""
    try:
        given = requests.in_range(params)
    except InputError as error:
        raise _refusal(error) from None
    sampling = Sampling(
        temperature=given["temperature"],
        top_k=given["top_k"] or None,
        top_p=given["top_p"] or None,
        seed=None if given["seed"] == UNSET_SEED else given["seed"],
        stop=given["stop"],
    )
    return given["max_new_tokens"], sampling


def _refusal(error: InputError) -> MlflowException:
    return MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(BDHText())
