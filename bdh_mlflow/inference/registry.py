"""A checkpoint as a version of a registered model that `mlflow models serve` serves over HTTP.

The model is code that MLflow runs from a file (`pyfunc`), a copy of this package, and one exported safetensors file: nothing in it is
pickled. It is logged under the run it comes from, whose status does not change. Its requirements are few, pinned to the versions installed
here.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

import bdh_mlflow
from bdh_mlflow import files, host
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import InputError
from bdh_mlflow.inference import export, pyfunc, requests
from bdh_mlflow.inference.export import Format
from bdh_mlflow.tracking import locate, store
from bdh_mlflow.tracking.mlflow_internals import check_model_alias, check_model_name, default_store

MODEL_TYPE = "bdh-text"
PACKAGE = Path(bdh_mlflow.__file__).parent
PACKAGES = {"huggingface": ["tokenizers"], "sentencepiece": ["sentencepiece"], "tiktoken": ["tiktoken"]}
"""What reads a tokenizer's file."""
TYPES = {int: DataType.long, float: DataType.double, str: DataType.string}


@dataclass(frozen=True)
class Registration:
    """As what a model is registered.   alias: to point to the new version.   kind: of the weights file; None = as it was trained."""

    name: str
    alias: str | None = None
    kind: Format | None = None


def signature() -> ModelSignature:
    """A column of prompts to a column of texts, with the parameters of a request and their defaults."""
    params = [ParamSpec(name, TYPES[type(value)], value) for name, value in requests.DEFAULTS.items()]
    column = [Schema([ColSpec(DataType.string, name)]) for name in (requests.PROMPT, pyfunc.TEXT)]
    return ModelSignature(column[0], Schema([ColSpec(DataType.string)]), ParamSchema(params))


def requirements(four_bit: bool, tokenizer: str = "byte") -> list[str]:
    """What a served model imports, pinned.   four_bit: whether its weights are packed in 4 bits, or rounded to them when loaded.

    tokenizer: as in `tokenizer.type`.

    Raises InputError if the version of one cannot be read: unpinned, the model might be served with another one.
    """
    names = ["mlflow", "torch", "numpy", "pydantic", "pyyaml", "safetensors", "psutil"] + ["bitsandbytes"] * four_bit
    names += PACKAGES.get(tokenizer, [])
    versions = {name: host.version_of(name) for name in names}
    if unknown := [name for name, version in versions.items() if version is None]:
        packages = " ".join(unknown)
        raise InputError(f"no version found of: {packages}; a served model needs it pinned: pip install --force-reinstall {packages}")
    return [f"{name}=={str(version).partition('+')[0]}" for name, version in versions.items()]


def register(
    target: str, registration: Registration, checkpoint_dir: Path, config: TrackingConfig, note: Callable[[str], None]
) -> tuple[str, str]:
    """Log and register the model of a target (as for `--resume`).   note: receives warnings.   Returns its version and its URI.

    Raises InputError for a name or alias that MLflow does not accept, ResumeError, CheckpointError, TrackingError.
    """
    name, alias = registration.name, registration.alias
    _check_names(registration)
    found = locate.Locator(checkpoint_dir, config).find(target)
    source, run_id = export.Source.of(found), found.run_id
    assert found.checkpoint is not None, "a source has a configuration"
    if run_id is None:
        raise InputError(f"{found.path}: its run is not in MLflow yet; deliver it first: bdh-mlflow sync {found.path.parent}")
    client = store.connect(config)
    manifest = found.checkpoint.manifest
    settings = source.config.low_precision
    kind = registration.kind or ("4bit" if settings.use_4bit else "safetensors")
    if kind == "4bit" and not settings.use_4bit:
        note("this run was not trained for 4-bit weights: expect a higher loss than its val/loss")
    with tempfile.TemporaryDirectory(prefix="register-") as folder, store.reported(f"{name} cannot be registered"):
        weights = Path(folder) / f"{pyfunc.WEIGHTS}{export.SUFFIX}"
        export.write(weights, source, kind)
        run = store.find_run(client, run_id)
        if run is None:
            raise InputError(f"run {run_id} of {found.path}: not found at {client.tracking_uri}")
        model = _save_model(Path(folder) / "model", weights, requirements(settings.use_4bit or kind == "4bit", source.tokenizer.kind))
        tags = {"bdh.checkpoint": f"runs:/{run_id}/{manifest.artifact_path}", "bdh.format": kind}
        model_id = _log_model(client, run, model, manifest.step, tags)
        version = _add_version(client, name, model_id, {**tags, "bdh.step": str(manifest.step)})
        if alias is not None:
            client.set_registered_model_alias(name, alias, version.version)
        loss = f", val/loss {manifest.val_loss:.4f}" if manifest.val_loss is not None else ""
        client.update_model_version(name, str(version.version), f"step {manifest.step} of run {run.info.run_name}{loss}, {kind}")
    return str(version.version), f"models:/{name}@{alias}" if alias else f"models:/{name}/{version.version}"


def _check_names(registration: Registration) -> None:
    for option, given, check in (("--name", registration.name, check_model_name), ("--alias", registration.alias, check_model_alias)):
        try:
            if given is not None:
                check(given)
        except MlflowException as error:
            raise InputError(f"{option} {given}: {files.first_line(error)}") from None


def _save_model(folder: Path, weights: Path, packages: list[str]) -> Path:
    """A pyfunc model in a local folder."""
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(pyfunc.__file__)),
        artifacts={pyfunc.WEIGHTS: str(weights)},
        code_paths=[str(PACKAGE)],
        signature=signature(),
        input_example=(pd.DataFrame({requests.PROMPT: ["def "]}), {"max_new_tokens": 8}),
        pip_requirements=packages,
    )
    return folder


def _log_model(client: MlflowClient, run: Run, folder: Path, step: int, tags: dict[str, str]) -> str:
    """Upload a saved model as a LoggedModel of its run.   Returns its id; the model is FAILED if the upload fails."""
    logged = client.create_logged_model(run.info.experiment_id, f"bdh-text-{step}", run.info.run_id, tags, {"step": str(step)}, MODEL_TYPE)
    try:
        client.log_model_artifacts(logged.model_id, str(folder))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _add_version(client: MlflowClient, name: str, model_id: str, tags: dict[str, str]) -> ModelVersion:
    """What `mlflow.register_model` does, at the client's store instead of the process's default one."""
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    with default_store(client.tracking_uri):
        version = client.create_model_version(name, f"models:/{model_id}", tags=tags, model_id=model_id)
    client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps([{"name": name, "version": version.version}])})
    return version
