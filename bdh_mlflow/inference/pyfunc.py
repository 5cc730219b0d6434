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
from bdh_mlflow.inference import generate
from bdh_mlflow.inference.generate import Loaded, Sampling

WEIGHTS = "weights"
PROMPT, TEXT = "prompt", "text"
MOST_NEW_TOKENS = 65_536
UNSET_SEED, UNRESTRICTED = -1, 0
"""Parameters of a served model have one type each: these stand for None."""


class BDHText(PythonModel):
    """Continues each prompt.   Requests are answered one at a time, as one uses all cores already."""

    def __init__(self) -> None:
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()

    def load_context(self, context: PythonModelContext) -> None:
        """Read the exported file among the model's artifacts."""
        self._loaded = generate.from_file(Path(context.artifacts[WEIGHTS]))

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """The continuations of a column of prompts.   Raises MlflowException INVALID_PARAMETER_VALUE (HTTP 400) for an invalid request."""
        assert self._loaded is not None, "MLflow calls load_context first"
        prompts = [str(prompt) for prompt in model_input[PROMPT]]
        count, sampling = parse_parameters(params or {})
        try:
            with self._lock:
                return generate.write_all(self._loaded, prompts, count, sampling) if prompts else []
        except InputError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None


def parse_parameters(params: dict[str, Any]) -> tuple[int, Sampling]:
    """Number of tokens and sampling of a request; parameters not given have DEFAULTS.   Raises MlflowException for one out of range."""
    given = {**DEFAULTS, **params}
    limits = {
        "max_new_tokens": (1, MOST_NEW_TOKENS),
        "temperature": (0, float("inf")),
        "top_k": (UNRESTRICTED, float("inf")),
        "top_p": (0, 1),
        "seed": (UNSET_SEED, 2**63 - 1),
    }
    for name, (least, most) in limits.items():
        if not least <= given[name] <= most:  # false for NaN too
            raise MlflowException(f"{name}: {given[name]}; accepted: {least} to {most}", error_code=INVALID_PARAMETER_VALUE)
    sampling = Sampling(
        temperature=given["temperature"],
        top_k=given["top_k"] or None,
        top_p=given["top_p"] or None,
        seed=None if given["seed"] == UNSET_SEED else given["seed"],
        stop=given["stop"],
    )
    return given["max_new_tokens"], sampling


DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "temperature": 0.8, "top_k": 50, "top_p": 0.0, "seed": UNSET_SEED, "stop": ""}
"""Parameters of a request; top_k 0 and top_p 0 do not restrict, seed -1 is new randomness each time."""

mlflow.models.set_model(BDHText())
