"""A checkpoint as a registered model that answers over HTTP.

The model is a file of ours that MLflow runs (`pyfunc`), a copy of this package, and one exported safetensors file: nothing in it is
pickled. It is logged under the run it comes from, whose status stays as it is, and needs few packages, pinned to what is installed here.
"""

import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.validation import _validate_model_alias_name, _validate_model_name
from mlflow.utils.validation import _validate_model_alias_name_reserved as _reserved

from bdh_mlflow import files
from bdh_mlflow.config import Config, TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.inference import export, pyfunc
from bdh_mlflow.inference.export import Format
from bdh_mlflow.tracking import locate, store

MODEL_TYPE = "bdh-text"
TYPES = {int: DataType.long, float: DataType.double, str: DataType.string}


def signature() -> ModelSignature:
    """A column of prompts to a column of texts, with the parameters of a request and their defaults."""
    params = [ParamSpec(name, TYPES[type(value)], value) for name, value in pyfunc.DEFAULTS.items()]
    column = [Schema([ColSpec(DataType.string, name)]) for name in (pyfunc.PROMPT, pyfunc.TEXT)]
    return ModelSignature(column[0], Schema([ColSpec(DataType.string)]), ParamSchema(params))


def requirements(four_bit: bool) -> list[str]:
    """What a served model imports, pinned.   four_bit: whether its weights are packed in 4 bits, or rounded to them when loaded."""
    names = ["mlflow", "torch", "numpy", "pydantic", "pyyaml", "safetensors", "psutil"] + ["bitsandbytes"] * four_bit
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in names]


def register(
    target: str,
    name: str,
    alias: str | None,
    kind: Format | None,
    checkpoint_dir: Path,
    config: TrackingConfig,
    note: Callable[[str], None],
) -> tuple[str, str]:
    """Log and register the model of a target (grammar of `resume`).   Returns its version and its URI.

    kind: None for the format it was trained for.

    Raises InputError for a name or alias that MLflow does not take, ResumeError, CheckpointError, TrackingError.
    """
    checks = ("--name", name, _validate_model_name), ("--alias", alias, _validate_model_alias_name), ("--alias", alias, _reserved)
    for option, given, check in checks:
        try:
            if given is not None:
                check(given)
        except MlflowException as error:
            raise InputError(f"{option} {given}: {files.first_line(error)}") from None
    found = locate.Locator(checkpoint_dir, config).find(target)
    if found.checkpoint is None:
        raise InputError(f"{found.path}: bare weights without a configuration; train from it first (a warm start)")
    run_id = found.run_id or locate.run_of(found.checkpoint)
    if run_id is None:
        raise InputError(f"{found.path}: its run is not in MLflow yet; deliver it first: bdh-mlflow sync {found.path.parent}")
    client = store.connect(config)
    manifest = found.checkpoint.manifest
    settings = Config.from_dict(found.state["config"], origin=str(found.path)).low_precision
    kind = kind or ("4bit" if settings.use_4bit else "safetensors")
    if kind == "4bit" and not settings.use_4bit:
        note("this run was not trained for 4-bit weights: expect a higher loss than its val/loss")
    with tempfile.TemporaryDirectory(prefix="register-") as folder, store.reported(f"{name} cannot be registered"):
        weights = Path(folder) / f"{pyfunc.WEIGHTS}{export.SUFFIX}"
        export.write(weights, found.state, manifest.val_loss, kind)
        run = store.find_run(client, run_id)
        if run is None:
            raise InputError(f"run {run_id} of {found.path}: not found at {client.tracking_uri}")
        tags = {"bdh.checkpoint": f"runs:/{run_id}/{manifest.artifact_path}", "bdh.format": kind}
        mlflow.pyfunc.save_model(
            path=str(Path(folder) / "model"),
            python_model=str(Path(pyfunc.__file__)),
            artifacts={pyfunc.WEIGHTS: str(weights)},
            code_paths=[str(Path(pyfunc.__file__).parent)],
            signature=signature(),
            input_example=(pd.DataFrame({pyfunc.PROMPT: ["def "]}), {"max_new_tokens": 8}),
            pip_requirements=requirements(settings.use_4bit or kind == "4bit"),
        )
        made = client.create_logged_model(
            run.info.experiment_id, f"bdh-text-{manifest.step}", run_id, tags, {"step": str(manifest.step)}, MODEL_TYPE
        )
        try:
            client.log_model_artifacts(made.model_id, str(Path(folder) / "model"))
        except BaseException:
            client.finalize_logged_model(made.model_id, "FAILED")
            raise
        client.finalize_logged_model(made.model_id, "READY")
        version = mlflow.register_model(f"models:/{made.model_id}", name, tags={**tags, "bdh.step": str(manifest.step)})
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
        loss = f", val/loss {manifest.val_loss:.4f}" if manifest.val_loss is not None else ""
        client.update_model_version(name, str(version.version), f"step {manifest.step} of run {run.info.run_name}{loss}, {kind}")
    return str(version.version), f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"
