"""Configuration: defaults, reading, problems."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from bdh_mlflow import __version__
from bdh_mlflow.config import BDHConfig, Config, Difference, Problem, Role, changes_trajectory, documentation, role_of
from bdh_mlflow.errors import ConfigError

PROJECT = Path(__file__).parents[2]

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "n_layer": 6,
        "n_embd": 256,
        "dropout": 0.1,
        "n_head": 4,
        "mlp_internal_dim_multiplier": 128,
        "vocab_size": 256,
        "attention_decay": 0.0,
    },
    "training": {
        "block_size": 512,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_iters": 3000,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "optimizer": "adamw",
        "betas": [0.9, 0.999],
        "grad_clip": 1.0,
        "grad_clip_z": 0.0,
        "ema_decay": 0.0,
        "detach_state": False,
        "carry_state": False,
        "seed": 1337,
        "log_freq": 100,
        "test_freq": 500,
        "test_iters": 8,
        "checkpoint_freq": 500,
        "checkpoint_dir": "checkpoints",
        "keep_checkpoints": None,
        "resume_from_checkpoint": None,
        "device": "auto",
        "compile": "auto",
        "layer_form": "auto",
        "recompute": "auto",
        "strategy": "auto",
        "debug": False,
    },
    "scheduler": {
        "type": "constant",
        "warmup_steps": 0,
        "decay_steps": None,
        "min_lr": 0.0,
        "gamma": 0.999,
        "factor": 0.5,
        "patience": 2,
    },
    "dataloader": {"num_workers": 0, "pin_memory": True, "prefetch_factor": 2},
    "dataset": {
        "parquet_dir": "data/python-stdlib",
        "source": "auto",
        "text_column": "text",
        "max_cached_files": 5,
        "val_fraction": 0.01,
    },
    "tokenizer": {
        "type": "byte",
        "path": None,
        "name": None,
        "train_size": None,
        "separator": None,
        "lossy": False,
        "digest": None,
    },
    "low_precision": {
        "use_fp8": False,
        "use_4bit": True,
        "use_4bit_optimizer": False,
        "optimizer_bits": None,
        "quantization_type": "nf4",
        "use_double_quant": True,
        "compute_dtype": "bfloat16",
    },
    "fp8": {"format": "hybrid", "amax_history_len": 1024, "amax_compute_algo": "max", "emulate": False},
    "tracking": {
        "experiment": "bdh",
        "run_name": None,
        "tags": {},
        "tracking_uri": None,
        "mirror_checkpoints": True,
        "log_system_metrics": True,
        "analyze_freq": 0,
    },
}


def problems(tree: dict, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(tree, overrides, origin="here")
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"here: {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return lines


def test_defaults_are_the_documented_ones() -> None:
    assert Config().to_dict() == DEFAULTS


def test_main_configuration_is_complete_and_holds_the_defaults() -> None:
    path = PROJECT / "configs" / "config.yaml"
    assert yaml.safe_load(path.read_text()) == DEFAULTS
    assert Config.from_yaml(path) == Config.from_dict({}, base=Path.cwd())


@pytest.mark.parametrize(
    "path", sorted(p for p in (PROJECT / "configs").glob("*.yaml") if p.name not in ("sweep.yaml", "sentences.yaml")), ids=lambda p: p.name
)
def test_shipped_configurations_name_every_setting_with_a_comment(path: Path) -> None:
    assert {s: set(keys) for s, keys in yaml.safe_load(path.read_text()).items()} == {s: set(keys) for s, keys in DEFAULTS.items()}
    settings = [line for line in path.read_text().splitlines() if line.startswith("  ")]
    assert [line for line in settings if "  # " not in line] == []


def test_every_setting_is_documented() -> None:
    rows = documentation()
    assert [row[0] for row in rows] == [f"{s}.{k}" for s, keys in DEFAULTS.items() for k in keys]
    assert [row for row in rows if not all(row)] == []


def test_numbers_written_as_text_are_numbers() -> None:
    config = Config.from_dict({"training": {"learning_rate": "1e-3", "batch_size": "4"}})
    assert (config.training.learning_rate, config.training.batch_size) == (1e-3, 4)


def test_overrides_win_over_the_file_and_the_last_one_over_earlier_ones() -> None:
    config = Config.from_dict({"training": {"seed": 1, "debug": True}}, ["training.seed=2", "training.seed=3", "model.n_embd=64"])
    assert (config.training.seed, config.training.debug, config.model.n_embd) == (3, True, 64)


def test_overrides_reach_into_tags() -> None:
    config = Config.from_dict({"tracking": {"tags": {"a": "1"}}}, ["tracking.tags.b=2.0"])
    assert config.tracking.tags == {"a": "1", "b": "2.0"}


def test_text_stays_text_also_where_it_looks_like_a_number_or_a_date(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("tracking: {run_name: 2025-11-08}\n")
    config = Config.from_yaml(tmp_path / "a.yaml", ["tracking.experiment=2024_01", "dataset.parquet_dir=007", "dataset.source=null"])
    assert (config.tracking.run_name, config.tracking.experiment) == ("2025-11-08", "2024_01")
    assert (Path(config.dataset.parquet_dir), config.dataset.source) == (Path.cwd() / "007", None)


def test_unknown_key_names_the_nearest() -> None:
    assert problems({"training": {"learning_rat": 1e-3}}) == ["training.learning_rat: unknown key; did you mean `learning_rate`?"]


def test_unknown_section_names_the_nearest() -> None:
    assert problems({"trainig": {}}) == ["trainig: unknown section; did you mean `training`?"]


def test_all_problems_are_reported_at_once() -> None:
    tree = {
        "model": {"n_embd": 256, "n_head": 3, "mlp_internal_dim_multiplier": 10},
        "training": {"batch_size": "many", "log_freq": 0, "debug": 3, "seed": True},
        "low_precision": {"compute_dtype": "bf16"},
    }
    assert sorted(problems(tree, "training.nothing=1", "training.block_size")) == sorted(
        [
            "training.block_size: expected section.key=value",
            'training.batch_size: found the text "many"; accepted: whole number >= 1',
            "training.log_freq: found 0; accepted: whole number >= 1",
            "training.debug: found 3; accepted: true | false",
            "training.seed: found true; true and false are not numbers; accepted: whole number >= 0 and < 9223372036854775808",
            "training.nothing: unknown key; known: " + ", ".join(DEFAULTS["training"]),
            'low_precision.compute_dtype: found the text "bf16"; accepted: bfloat16 | float16 | float32',
            "model.mlp_internal_dim_multiplier: 10 * n_embd 256 is not a multiple of 2 * n_head 3 "
            "(RoPE turns neurons in pairs; nearest multipliers: 9, 12)",
        ]
    )


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"scheduler": {"min_lr": 1.0}}, "scheduler.min_lr"),
        ({"scheduler": {"type": "cosine", "warmup_steps": 10, "decay_steps": 10}}, "scheduler.decay_steps"),
        ({"scheduler": {"type": "plateau"}, "dataset": {"val_fraction": 0}}, "scheduler.type"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"dataset": {"val_fraction": 1}}, "dataset.val_fraction"),
        ({"training": None, "model": [1]}, "model"),
    ],
)
def test_values_that_do_not_go_together_are_refused(tree: dict, key: str) -> None:
    assert [line.partition(":")[0] for line in problems(tree)] == [key]


def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated() -> None:
    (line,) = problems({"tracking": {"tracking_uri": "https://me:secret@host"}})
    assert "MLFLOW_TRACKING_PASSWORD" in line
    assert "secret" not in line


def test_further_checks_are_reported_with_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"2 problems(.|\n)*n_layer(.|\n)*use_fp8: no"):
        Config.from_dict({"model": {"n_layer": 0}}, checks=[lambda config: [Problem("low_precision.use_fp8", "no")]])


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").touch()
    with pytest.raises(ConfigError, match=r"quick\.yaml: no such file .*did you mean .*quickstart\.yaml"):
        Config.from_yaml(tmp_path / "quick.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model:\n  n_layer: [1\ntraining: {}\n", r"line 3, column 9: not valid YAML"),
        ("model:\n  n_layer: 1\n  n_layer: 2\n", r"line 3, column 3: not valid YAML: key `n_layer` is given twice"),
        ("- model\n", r"expected sections \(model, .*found a list"),
        ("\x00", "not valid YAML"),
    ],
)
def test_text_that_is_not_a_configuration_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        Config.from_yaml(path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("model:\n")
    assert Config.from_yaml(tmp_path / "empty.yaml") == Config.from_dict({}, base=Path.cwd())


def test_saved_yaml_reads_back_to_the_same_configuration() -> None:
    config = Config.from_dict({"tracking": {"tags": {"a": "b"}, "run_name": "7"}, "training": {"learning_rate": 3e-4}})
    assert Config.from_dict(yaml.safe_load(config.to_yaml())) == config
    assert config.digest() != Config().digest()


def test_replaced_takes_values_and_leaves_the_rest() -> None:
    before = Config.from_dict({"training": {"seed": 7}, "tracking": {"tags": {"a": "1"}}})
    after = before.replaced(
        {"training.max_iters": 5, "training.keep_checkpoints": None, "scheduler.min_lr": 1e-5, "tracking.tags.b.c": "2"}
    )
    assert after.differences(before) == [
        Difference("training.max_iters", 5, 3000),
        Difference("scheduler.min_lr", 1e-5, 0.0),
        Difference("tracking.tags.b.c", "2", None),
    ]
    assert before.tracking.tags == {"a": "1"}


def test_replaced_refuses_what_a_file_could_not_say() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*training\.max_iter: unknown key.*optimizer_bits: found 16"):
        Config().replaced({"training.max_iter": 5, "low_precision.optimizer_bits": 16})
    with pytest.raises(ConfigError, match=r"training\.seed\.x: unknown key"):
        Config().replaced({"training.seed.x": 5})
    with pytest.raises(ConfigError, match=r"trainin: unknown section"):
        Config().replaced({"trainin.max_iters": 5})
    with pytest.raises(ConfigError, match=r"min_lr: 1.0 is above training.learning_rate"):
        Config().replaced({"scheduler.min_lr": 1.0})


def test_derived_numbers_are_those_of_the_published_network() -> None:
    config = Config.from_dict({"training": {"gradient_accumulation_steps": 3}})
    assert (config.tokens_per_step, config.neurons, config.parameters) == (3 * 8 * 512, 8192, 25_296_896)


def test_differences_name_the_setting_and_both_values() -> None:
    later = Config.from_dict({"training": {"seed": 2, "max_iters": 9}})
    differences = Config().differences(later)
    assert differences == [Difference("training.max_iters", 3000, 9), Difference("training.seed", 1337, 2)]
    assert [changes_trajectory(d, later) for d in differences] == [False, True]


def test_evaluation_cadence_matters_to_a_plateau_schedule_only() -> None:
    difference = Difference("training.test_freq", 10, 20)
    assert not changes_trajectory(difference, Config())
    assert changes_trajectory(difference, Config.from_dict({"scheduler": {"type": "plateau"}}))


def keys_of(role: Role) -> set[str]:
    return {f"{section}.{key}" for section, keys in DEFAULTS.items() for key in keys if role_of(f"{section}.{key}") is role}


def test_setting_says_whether_a_resume_may_change_it() -> None:
    assert keys_of(Role.SHAPE) == {
        "model.n_embd",
        "model.n_head",
        "model.mlp_internal_dim_multiplier",
        "model.vocab_size",
        "training.optimizer",
        "low_precision.use_4bit_optimizer",
        "low_precision.optimizer_bits",
    }
    assert keys_of(Role.ORDER) == {
        "training.block_size",
        "training.carry_state",
        "training.seed",
        "tokenizer.type",
        "tokenizer.separator",
        "tokenizer.digest",
        "dataset.text_column",
        "dataset.max_cached_files",
        "dataset.val_fraction",
    }
    assert {"training.max_iters", "dataset.parquet_dir", "dataloader.num_workers", "tracking.tags"} <= keys_of(Role.FREE)
    assert {"model.n_layer", "training.learning_rate", "training.layer_form", "fp8.format"} <= keys_of(Role.TRAJECTORY)


def test_one_tag_has_the_role_of_all_tags_and_an_unknown_setting_none() -> None:
    assert role_of("tracking.tags.team") is Role.FREE
    with pytest.raises(KeyError):
        role_of("training.learning_rat")


def test_network_configuration_is_the_published_one() -> None:
    assert Config().to_bdh_config() == BDHConfig()


def test_saved_configuration_of_another_version_says_who_wrote_it() -> None:
    tree = {**Config().to_dict(), "carrier": {"pigeons": 3}}
    with pytest.raises(ConfigError, match=r"(?s)c\.pt \(its configuration\).*carrier: unknown section.*bdh-mlflow 9\.0 wrote it, this is"):
        Config.from_saved(tree, "c.pt", "9.0")
    with pytest.raises(ConfigError) as same:
        Config.from_saved(tree, "c.pt", __version__)
    assert "wrote it" not in str(same.value)


def test_settings_of_an_earlier_version_that_change_no_number_do_not_make_its_checkpoints_unreadable() -> None:
    tree = Config().to_dict()
    tree["tracking"] |= {"tags": {"a#b": "x"}, "run_name": "", "tracking_uri": "mlruns", "experiment": " "}
    tree["training"]["checkpoint_dir"] = "${NOT_SET}/x"
    tree["model"]["n_layer"] = 3
    read = Config.from_saved(tree, "checkpoint_1.pt", "0.2.0")
    assert (read.model.n_layer, read.tracking.tags, read.tracking.experiment) == (3, {}, "bdh")
    tree["training"]["learning_rate"] = -1
    with pytest.raises(ConfigError, match=r"1 problem\n  training.learning_rate: found -1"):
        Config.from_saved(tree, "checkpoint_1.pt", __version__)
