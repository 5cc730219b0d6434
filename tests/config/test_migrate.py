"""Configurations of the earlier program: every key is mapped or named, and the result is one of ours."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from bdh_mlflow.config import Config
from bdh_mlflow.config.former import FORMER
from bdh_mlflow.config.migrate import migrate
from bdh_mlflow.config.settings import SECTIONS
from bdh_mlflow.errors import ConfigError
from tests.conftest import only_run, run_cli

OLD: dict[str, Any] = {  # every key that its documentation and its code name
    "model": {"n_layer": 2, "n_embd": 16, "dropout": 0.1, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 256},
    "training": {
        "block_size": 8,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_iters": 12,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "log_freq": 2,
        "test_freq": 4,
        "checkpoint_freq": 4,
        "runs_dir": "runs",
        "resume_from_checkpoint": None,
        "compile_model": False,
        "debug": False,
    },
    "scheduler": {
        "type": "Cosine",
        "warmup_steps": 2,
        "warmup_type": "linear",
        "T_max": 4,
        "min_lr": 1e-5,
        "gamma": 0.95,
        "factor": 0.1,
        "patience": 10,
        "threshold": 1e-4,
    },
    "dataloader": {"num_workers": 0, "pin_memory": True, "prefetch_factor": 2},
    "dataset": {"parquet_dir": "text", "max_cached_files": 5, "val_split": 0.2, "val_batches": 2},
    "tokenizer": {"type": "byte", "name": None},
    "low_precision": {
        "use_fp8": False,
        "use_4bit": True,
        "use_4bit_optimizer": False,
        "quantization_type": "nf4",
        "use_double_quant": True,
        "compute_dtype": "float32",
    },
    "fp8": {"format": "hybrid", "amax_history_len": 1024, "amax_compute_algo": "max"},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return {**OLD, **{name: {**OLD.get(name, {}), **values} for name, values in sections.items()}}


def test_every_key_is_mapped_or_named_with_the_reason() -> None:
    tree, notes = migrate(changed(logging={"level": "info"}, model={"heads": 3}))
    Config.from_dict(tree)
    kept = {f"{name}.{key}" for name, values in tree.items() for key in values}
    for name, values in OLD.items():
        for key in values:
            assert (
                f"{name}.{key}" in kept or any(note.startswith(f"{name}.{key}") for note in notes) or (name, key) == ("tokenizer", "name")
            )
    assert 'logging.level: "info": left out: no such setting here' in notes
    assert "model.heads: 3: left out: no such setting here" in notes
    assert "training.runs_dir is now training.checkpoint_dir" in notes


def test_passes_become_updates_and_the_schedule_counts_from_the_first() -> None:
    tree, notes = migrate(OLD)
    training, scheduler = tree["training"], tree["scheduler"]
    assert [training[key] for key in ("max_iters", "log_freq", "test_freq", "checkpoint_freq")] == [6, 1, 2, 2]
    assert "training.max_iters: 12 passes are 6 updates of 2 passes each" in notes
    assert (scheduler["warmup_steps"], scheduler["decay_steps"]) == (2, 6)
    assert tree["dataset"]["val_fraction"] == 0.2
    assert tree["training"]["test_iters"] == 2
    assert "decay_steps" not in migrate(changed(scheduler={"type": "none"})).tree["scheduler"]
    without, said = migrate(changed(scheduler={"warmup_type": "constant"}))
    assert without["scheduler"]["warmup_steps"] == 0
    assert any("the first 2 updates had the full rate" in note for note in said)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"type": "byte", "name": "bytes"}, {"type": "byte"}),
        ({"type": "huggingface", "name": "gpt2"}, {"type": "huggingface", "name": "gpt2"}),
        ({"type": "huggingface", "name": "own/tokenizer.json"}, {"type": "huggingface", "path": "own/tokenizer.json"}),
        ({"type": "sentencepiece", "name": "spm.model"}, {"type": "sentencepiece", "path": "spm.model"}),
        ({"type": "tiktoken", "name": "cl100k_base"}, {"type": "tiktoken", "name": "cl100k_base"}),
    ],
)
def test_a_tokenizers_name_becomes_a_path_or_stays(before: dict[str, str], after: dict[str, str]) -> None:
    tree, _ = migrate(changed(tokenizer=before))
    assert tree["tokenizer"] == after
    assert tree["model"]["vocab_size"] == (256 if before["type"] == "byte" else None)
    Config.from_dict(tree)


def test_successors_are_settings_of_ours_and_the_old_names_are_none() -> None:
    for key, former in FORMER.items():
        section, _, name = key.partition(".")
        assert name not in SECTIONS[section].__pydantic_fields__, key
        if former.successor:
            section, _, name = former.successor.partition(".")
            assert name in SECTIONS[section].__pydantic_fields__, key
        else:
            assert former.reason


def test_an_old_key_is_refused_with_its_successor() -> None:
    with pytest.raises(ConfigError) as refused:
        Config.from_dict({"training": {"runs_dir": "x"}, "scheduler": {"warmup_type": "linear"}})
    assert "training.runs_dir: a key of an earlier program: it is now training.checkpoint_dir; bdh-mlflow config migrate" in str(
        refused.value
    )
    assert "scheduler.warmup_type: a key of an earlier program: there is none here (warm-up is linear)" in str(refused.value)


@pytest.mark.parametrize("spelling", ["none", "None", "NONE", "off", None, "constant", " Constant "])
def test_a_rate_that_stays_has_many_spellings(spelling: str | None) -> None:
    assert Config.from_dict({"scheduler": {"type": spelling}}).scheduler.type == "constant"


def test_a_migrated_configuration_trains(store: MlflowClient, text: Path) -> None:
    Path("old.yaml").write_text(yaml.safe_dump(OLD))
    result = run_cli("config", "migrate", "old.yaml", "--out", "new.yaml")
    assert result.exit_code == 0, result.output
    assert result.output.endswith("Next: bdh-mlflow train --config new.yaml\n")
    assert run_cli("config", "check", "--config", "new.yaml").exit_code == 0
    assert run_cli("train", "--config", "new.yaml", "--set", "tracking.log_system_metrics=false").exit_code == 0
    assert only_run(store).data.params["training.max_iters"] == "6"
    assert sorted(p.name for p in Path("runs").glob("*/*.pt")) == ["checkpoint_2.pt", "checkpoint_4.pt", "checkpoint_6.pt"]


def test_what_cannot_be_migrated_is_one_clear_error() -> None:
    assert "old.yaml: no such file" in run_cli("config", "migrate", "old.yaml").output
    Path("old.yaml").write_text(yaml.safe_dump(changed(training={"batch_size": 0})))
    refused = run_cli("config", "migrate", "old.yaml")
    assert (refused.exit_code, "old.yaml, migrated: 1 problem\n  training.batch_size: found 0" in refused.output) == (2, True)
    Path("new.yaml").touch()
    assert "--out new.yaml: there already" in run_cli("config", "migrate", "old.yaml", "--out", "new.yaml").output
