"""Load a run, a checkpoint, an exported file or a registered model ready to generate, and evaluate it on other text.

A target is given as for `--resume` (see `locate`). Evaluation computes in the number formats of training.
"""

import dataclasses
import json
import math
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.utils.models import get_model_name_and_version

from bdh_mlflow.config import DatasetConfig, TrackingConfig
from bdh_mlflow.data import validation
from bdh_mlflow.data.parquet import ParquetText
from bdh_mlflow.errors import CheckpointError, InputError, NonFiniteError
from bdh_mlflow.inference import export, generate
from bdh_mlflow.inference.generate import Loaded
from bdh_mlflow.redact import masked
from bdh_mlflow.text import bits_per_byte
from bdh_mlflow.tracking import locate, store
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.training.evaluate import Evaluator
from bdh_mlflow.vocabulary.find import find


def load(target: str, checkpoint_dir: Path, config: TrackingConfig, *, average: bool = False) -> Loaded:
    """The model of a run or checkpoint (as for `--resume`), of an exported file, or a registered one (models:/NAME@ALIAS).

    average: the moving average of a checkpoint's weights instead of them. Raises InputError, ResumeError or CheckpointError.
    """
    if average and (target.endswith(export.SUFFIX) or target.startswith("models:/")):
        raise InputError(f"{target}: holds one set of weights; --ema is of checkpoints")
    if target.endswith(export.SUFFIX):
        return generate.from_file(Path(target))
    locator = locate.Locator(checkpoint_dir, config)
    if target.startswith("models:/") and (registered := _registered(target, locator)):
        return registered
    return of_checkpoint(locator.find(target), average)


def of_checkpoint(found: ResolvedCheckpoint, average: bool = False) -> Loaded:
    """The model of a checkpoint.   average: as for `load`.

    Raises CheckpointError for weights without a configuration, InputError without an average, ConfigError without its tokenizer.
    """
    own = found.config()
    assert found.checkpoint is not None, "it has a configuration"
    tokenizer = find(own.tokenizer, found.path.parent)
    contents = generate.Contents(export.weights_of(found, average), own, tokenizer, found.state.get("precision_state_dict", {}))
    step, notes = found.checkpoint.manifest.step, tuple(f"skipped {note}" for note in found.notes)
    return dataclasses.replace(generate.from_weights(contents, found.path, step, notes), run_id=found.run_id)


def _registered(uri: str, locator: locate.Locator) -> Loaded | None:
    """The model that `registry` registered under this URI; None for any other models:/ URI."""
    client = locator.mirror.client
    try:
        version = client.get_model_version(*get_model_name_and_version(client, uri))  # type: ignore[no-untyped-call]
    except (MlflowException, TypeError):  # TypeError: the id of a logged model, which has no version
        return None
    if "bdh.format" not in version.tags:
        return None
    with tempfile.TemporaryDirectory(prefix="model-") as folder:
        (file,) = locator.mirror.download(uri, Path(folder)).rglob(f"*{export.SUFFIX}")
        try:
            return dataclasses.replace(generate.from_file(file), path=Path(uri), run_id=version.run_id)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(file), uri)) from None


class Measured(NamedTuple):
    """A loss on other text.   loss: nats per token.   bits_per_byte: the same of text.   text: what it was measured on.

    alone: where a state was carried from window to window, the loss on the same windows without.
    """

    loss: float
    bits_per_byte: float
    text: ParquetText
    alone: float | None = None


def validation_loss(loaded: Loaded, dataset: DatasetConfig, batches: int, *, carry: bool = False) -> Measured:
    """Loss on validation text of `dataset`.   carry: rows read on, with a state.   Raises DataError, NonFiniteError."""
    training = loaded.config.training
    text = ParquetText(dataset, tokenizer=loaded.tokenizer, lossy=loaded.config.tokenizer.lossy)
    windows = (validation.stream if carry else validation.drawn)(text, batches, training.batch_size, training.block_size)
    if not windows:
        raise InputError("dataset.val_fraction is 0: no text is kept for validation")
    evaluator = Evaluator(model=loaded.model, autocast=loaded.precision.autocast, device=loaded.precision.device)
    alone = evaluator.loss(windows)
    loss = evaluator.carried_loss(windows, loaded.model.initial_state(len(windows[0]))) if carry else alone
    assert loss is not None, "it was given no way to be interrupted"
    if not math.isfinite(loss):
        raise NonFiniteError(f"{loaded.path}: val/loss {loss}: its weights, or the numbers they are computed in, are not finite")
    return Measured(loss, bits_per_byte(loss, text.bytes_per_token(windows)), text, alone if carry else None)


def record(loaded: Loaded, measured: Measured, config: TrackingConfig, suffix: str = "") -> list[str]:
    """Log an evaluation to the model's run, at the checkpoint's step and with its dataset.   Returns the names of the metrics.

    suffix: of those names, for other weights than the checkpoint's own.

    Raises TrackingError.
    """
    assert loaded.run_id is not None, "the caller checks that there is a run"
    text = measured.text
    name = re.sub(r"[^\w.-]", "_", text.root.name)
    values = {f"eval/{name}_loss{suffix}": measured.loss, f"eval/{name}_bpb{suffix}": measured.bits_per_byte}
    if measured.alone is not None:
        values[f"eval/{name}_loss{suffix.replace('_carried', '_stream')}"] = measured.alone
    client, now_ms = store.connect(config), int(1000 * time.time())
    with store.reported(f"run {loaded.run_id}: the evaluation cannot be logged"):
        client.log_batch(loaded.run_id, [Metric(key, value, now_ms, loaded.step) for key, value in values.items()], synchronous=True)
        source = json.dumps({"uri": masked(str(text.root.absolute()))})
        data = Dataset(f"{text.root.name} (evaluation)", text.digest, "local", source, profile=json.dumps({"num_rows": text.rows}))
        client.log_inputs(loaded.run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "evaluation")])])
    return list(values)
