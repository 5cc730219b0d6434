"""From a target to a run that goes on: every form of the grammar, and exactness through the whole program."""

import json
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import CheckpointError, ResumeError
from bdh_mlflow.model.bdh import BDH, BDHConfig
from bdh_mlflow.tracking.locate import Locator
from bdh_mlflow.tracking.resolved import ResolvedCheckpoint
from bdh_mlflow.tracking.tracker import Tracker
from tests.checkpoint.test_files import Evil
from tests.conftest import history, only_run, run_cli, train

CHECKPOINTS = Path("checkpoints")


@pytest.fixture
def half(store: MlflowClient, text: Path, tiny: Path) -> Any:
    """A run that was to make six steps and made three; its MLflow run."""
    result = train(tiny, "training.max_iters=3", "scheduler.decay_steps=6")
    assert result.exit_code == 0, result.output
    return only_run(store)


def run_dir() -> Path:
    (found,) = checkpoint.list_all(CHECKPOINTS)
    return found


def loaded(step: int) -> dict[str, Any]:
    return checkpoint.load(run_dir() / checkpoint.file_name(step))


QUICK_FORMS = ["latest", "file", "run id", "runs:/ file", "latest:N"]
FORMS = [*QUICK_FORMS, "directory", "runs:/", "runs:/ folder", "artifact URI", "directory:N", "run id:N", "runs:/:N"]
HERE = pytest.param(True, id="here")
MIRRORED = pytest.param(False, id="mirrored only", marks=pytest.mark.slow)  # the same forms, each with a download


@pytest.mark.parametrize("form", [pytest.param(form, marks=[] if form in QUICK_FORMS else pytest.mark.slow) for form in FORMS])
@pytest.mark.parametrize("local", [HERE, MIRRORED])
def test_every_form_continues_the_same_run_in_the_same_directory(
    store: MlflowClient, tiny: Path, half: Any, form: str, local: bool
) -> None:
    run_id, directory = half.info.run_id, run_dir()
    mirror = f"checkpoints/{directory.name}"
    targets = {
        "latest": "latest",
        "file": str(directory / "checkpoint_3.pt"),
        "directory": str(directory),
        "run id": run_id,
        "runs:/": f"runs:/{run_id}",
        "runs:/ file": f"runs:/{run_id}/{mirror}/checkpoint_3.pt",
        "runs:/ folder": f"runs:/{run_id}/{mirror}",
        "artifact URI": f"file://{half.info.artifact_uri}/{mirror}/checkpoint_3.pt",
    }
    targets |= {f"{name}:N": f"{targets[name]}:3" for name in ("latest", "directory", "run id", "runs:/")}
    if not local:
        if form in ("file", "directory", "directory:N"):
            pytest.skip("a local path needs the local file")
        shutil.rmtree(CHECKPOINTS)
    result = train(tiny, resume=targets[form])
    assert result.exit_code == 0, result.output
    run = only_run(store)
    assert run.info.run_id == run_id
    assert [step for step, _ in history(store, run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [p.name for p in checkpoint.list_all(CHECKPOINTS)] == [directory.name]
    assert loaded(6)["step"] == 6
    assert (run.data.tags["bdh.segment"], run.info.status) == ("2", "FINISHED")
    assert not list(CHECKPOINTS.glob(".download-*"))


@pytest.mark.parametrize("named", [True, False], ids=["named in the checkpoint", "from before there was a choice"])
def test_form_of_the_layers_stays_that_of_the_run(
    store: MlflowClient, text: Path, tiny: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tiny, "training.layer_form=reference", "training.max_iters=3").exit_code == 0
    real = Locator.find

    def find(self: Locator, target: str) -> ResolvedCheckpoint:
        found = real(self, target)
        if not named:
            del found.state["config"]["training"]["layer_form"]
            del found.state["config"]["low_precision"]["optimizer_bits"]
            del found.state["config"]["fp8"]["emulate"]
            del found.state["precision_state_dict"]
        return found

    monkeypatch.setattr(Locator, "find", find)
    assert train(tiny, resume="latest").exit_code == 0
    assert only_run(store).data.tags["bdh.layer_form"].startswith("reference (as in the resumed run;")
    assert loaded(6)["config"]["training"]["layer_form"] == "reference"


def test_extending_a_finished_run_goes_on_where_it_ended(store: MlflowClient, tiny: Path, half: Any) -> None:
    assert train(tiny, "training.max_iters=4", resume=half.info.run_id).exit_code == 0
    run = only_run(store)
    assert [step for step, _ in history(store, run.info.run_id, "train/loss")] == [1, 2, 3, 4]
    assert run.data.params["training.max_iters"] == "3"
    assert run.data.tags["drift.training.max_iters"] == "3 -> 4"


def test_earlier_checkpoint_of_a_run_replays_without_logging_twice(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0
    run = only_run(store)
    before = history(store, run.info.run_id, "train/loss")
    first = run_dir() / "checkpoint_3.pt"
    assert train(tiny, resume=f"runs:/{run.info.run_id}/checkpoints/{run_dir().name}/{first.name}").exit_code == 0
    assert history(store, run.info.run_id, "train/loss") == before
    assert {v for _, v in history(store, run.info.run_id, "resume/replay_max_abs_diff")} == {0.0}


@pytest.mark.parametrize("local", [HERE, MIRRORED])
@pytest.mark.parametrize("form", ["latest", "run id", "directory"])
def test_step_of_a_run_is_found_or_its_steps_are_listed(store: MlflowClient, text: Path, tiny: Path, form: str, local: bool) -> None:
    if form == "directory" and not local:
        pytest.skip("a local path needs the local file")
    assert train(tiny).exit_code == 0
    run_id, config = only_run(store).info.run_id, TrackingConfig()
    target = {"latest": "latest", "run id": run_id, "directory": str(run_dir())}[form]
    if not local:
        shutil.rmtree(CHECKPOINTS)
    found = Locator(CHECKPOINTS, config).find(f"{target}:3")
    assert (found.state["step"], found.path.name) == (3, "checkpoint_3.pt")
    assert [p.name for p in sorted(run_dir().glob("*.pt"))] == ["checkpoint_3.pt"] + ["checkpoint_6.pt"] * local, "nothing else is fetched"
    with pytest.raises(ResumeError, match="no checkpoint of step 4; it has 3, 6"):
        Locator(CHECKPOINTS, config).find(f"{target}:4")
    with pytest.raises(ResumeError, match="nowhere: no such folder"):
        Locator(CHECKPOINTS, config).find("nowhere:3")
    with pytest.raises(ResumeError, match="one step already"):
        Locator(CHECKPOINTS, config).find(f"{run_dir() / 'checkpoint_3.pt'}:3")


@pytest.mark.parametrize("mirrored", [True, False])
def test_damaged_step_of_a_run_is_taken_from_the_mirror_or_named(store: MlflowClient, text: Path, tiny: Path, mirrored: bool) -> None:
    assert train(tiny, f"tracking.mirror_checkpoints={str(mirrored).lower()}").exit_code == 0
    last = run_dir() / "checkpoint_3.pt"
    replaced(last, b"x" * last.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        Locator(CHECKPOINTS, TrackingConfig()).find("latest:3")
    target = f"{only_run(store).info.run_id}:3"
    if mirrored:
        assert Locator(CHECKPOINTS, TrackingConfig()).find(target).state["step"] == 3
    else:
        with pytest.raises(CheckpointError, match="damaged"):
            Locator(CHECKPOINTS, TrackingConfig()).find(target)


def replaced(path: Path, content: bytes) -> None:
    """Another file of that name: the mirror may be a second name of the old one."""
    path.unlink()
    path.write_bytes(content)


def test_furthest_copy_wins_and_a_damaged_one_is_named_and_passed_over(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0
    run_id, last = only_run(store).info.run_id, run_dir() / "checkpoint_6.pt"
    raw = bytearray(last.read_bytes())
    raw[len(raw) // 2] ^= 1
    replaced(last, bytes(raw))
    found = Locator(CHECKPOINTS, TrackingConfig()).find(run_id)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 6  # the mirrored copy, put in the damaged one's place
    assert len(found.notes) == 1
    assert "checkpoint_6.pt: damaged" in found.notes[0]
    replaced(last, bytes(raw))
    found = Locator(CHECKPOINTS, TrackingConfig()).find(str(run_dir()))
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 3


def test_run_that_the_target_names_is_continued_though_its_checkpoint_was_saved_before_it_had_one(
    store: MlflowClient, text: Path, tiny: Path
) -> None:
    """Saved while the server was down, mirrored later, resumed where only the mirror is."""
    assert train(tiny, "training.max_iters=3").exit_code == 0
    run = only_run(store)
    manifest = run_dir() / "checkpoint_3.json"
    mirrored = Path(run.info.artifact_uri.removeprefix("file://")) / "checkpoints" / run_dir().name / manifest.name
    mirrored.write_text(json.dumps({**json.loads(manifest.read_text()), "mlflow_run_id": None}))
    shutil.rmtree(CHECKPOINTS)
    result = train(tiny, resume=run.info.run_id)
    assert result.exit_code == 0, result.output
    again = only_run(store)
    assert again.info.run_id == run.info.run_id
    assert [step for step, _ in history(store, run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert again.data.tags["bdh.resumed_from"].startswith(f"runs:/{run.info.run_id}/")


def refused(result: Any) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return str(result.output)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.pt", "nowhere.pt: no such file or folder"),
        ("latest", "latest: no checkpoint in"),
        ("f" * 32, f"run {'f' * 32}: not found at sqlite:///"),
        (f"runs:/{'f' * 32}/checkpoints/x/checkpoint_1.pt", "not found at sqlite:///"),
        ("file:///nowhere/checkpoint_1.pt", "file:///nowhere/checkpoint_1.pt: cannot be downloaded"),
        ("models:/nothing/1", "models:/nothing/1: cannot be downloaded"),
    ],
)
def test_target_that_does_not_exist_is_refused_and_nothing_is_written(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, target: str, message: str
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert message in refused(train(tiny, resume=target))
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert store.get_experiment_by_name("bdh") is None


def test_run_without_checkpoints_is_refused(store: MlflowClient, text: Path, tiny: Path) -> None:
    run_id = store.create_run(store.create_experiment("bdh")).info.run_id
    assert "no checkpoint that verifies, neither in checkpoints nor mirrored" in refused(train(tiny, resume=run_id))


def test_another_architecture_is_refused_with_both_values(tiny: Path, half: Any) -> None:
    output = refused(train(tiny, "model.n_embd=32", "training.seed=7", resume="latest"))
    assert "model.n_embd was 16, config says 32" in output
    assert "training.seed was 1337, config says 7" in output
    assert "Shapes are fixed for the life of a run" in output
    assert "checkpoints/run_" in output


def test_setting_that_the_kept_layer_form_cannot_do_is_named(tiny: Path, half: Any) -> None:
    """The run keeps its form; `recompute` may change on resume, but blocked cannot do without."""
    output = refused(train(tiny, "training.recompute=false", resume="latest"))
    assert 'training.layer_form: "blocked" cannot be combined with training.recompute false' in output
    assert "config says reference" not in output


def test_runs_that_cannot_be_listed_are_one_error(store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    result = train(tiny, resume="latest")
    assert result.exit_code == 1
    assert f"runs of experiment bdh cannot be listed: Run with id={'f' * 32} not found" in result.output


def test_changed_data_is_refused(text: Path, tiny: Path, half: Any) -> None:
    shutil.copy(text / "part-0.parquet", text / "part-2.parquet")
    assert "is not what" in refused(train(tiny, resume="latest"))


def test_damaged_file_is_refused_with_the_newest_whole_one(store: MlflowClient, text: Path, tiny: Path) -> None:
    assert train(tiny).exit_code == 0
    last = run_dir() / "checkpoint_6.pt"
    last.write_bytes(last.read_bytes()[:-10])
    output = refused(train(tiny, resume=str(last)))
    assert "damaged" in output
    assert "Newest complete: checkpoint_3.pt" in output
    (run_dir() / "checkpoint_6.json").unlink()
    assert "not a checkpoint" in refused(train(tiny, resume=str(last)))


def test_pickle_with_code_is_refused_and_not_run(store: MlflowClient, text: Path, tiny: Path) -> None:
    torch.save({"model_state_dict": Evil()}, "evil.pt")
    assert "refused: it holds Python objects" in refused(train(tiny, resume="evil.pt"))
    assert not Path("owned").exists()


def foreign(layout: str) -> BDH:
    torch.manual_seed(5)
    network = BDH(BDHConfig(n_layer=2, n_embd=16, dropout=0.1, n_head=2, mlp_internal_dim_multiplier=4))
    weights = {**network.state_dict(), "attn.freqs": 2 * network.attn.freqs}
    torch.save(weights if layout == "bare" else {"step": 9, "model_state_dict": weights, "optimizer_state_dict": {}}, "foreign.pt")
    return network


@pytest.mark.parametrize("layout", ["bare", "ancestor"])
def test_weights_of_another_program_are_a_warm_start(store: MlflowClient, text: Path, tiny: Path, layout: str) -> None:
    network = foreign(layout)
    result = train(tiny, "training.max_iters=1", "training.learning_rate=1e-9", "training.weight_decay=0", resume="foreign.pt")
    assert result.exit_code == 0, result.output
    state = loaded(1)
    assert state["step"] == 1
    assert torch.allclose(state["model_state_dict"]["encoder"], network.encoder, atol=1e-6)
    assert torch.equal(state["model_state_dict"]["attn.freqs"], 2 * network.attn.freqs)
    assert only_run(store).data.tags["bdh.warm_start"] == "foreign.pt"


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not all of them are finite"), (0.5, "the two neurons of a pair")])
def test_frequencies_that_turn_nothing_are_refused(store: MlflowClient, text: Path, tiny: Path, value: float, reason: str) -> None:
    weights = foreign("bare").state_dict()
    weights["attn.freqs"][..., 0] = value
    torch.save(weights, "foreign.pt")
    assert f"attn.freqs: {reason}" in refused(train(tiny, resume="foreign.pt"))


def test_warm_start_of_other_shapes_is_refused_with_both(store: MlflowClient, text: Path, tiny: Path) -> None:
    foreign("bare")
    output = refused(train(tiny, "model.n_head=4", resume="foreign.pt"))
    assert "encoder: shape (2, 16, 32), config says (4, 16, 16)" in output
    assert store.get_experiment_by_name("bdh") is None


def test_directory_of_another_run_is_not_mixed_with_a_download(store: MlflowClient, tiny: Path, half: Any) -> None:
    directory = run_dir()
    for manifest in directory.glob("*.json"):
        manifest.write_text(manifest.read_text().replace(half.info.run_id, "0" * 32))
    output = refused(train(tiny, resume=half.info.run_id))
    assert f"holds checkpoints of another run ({'0' * 32})" in output


def test_fork_is_a_new_run_from_the_checkpoint_in_which_settings_differ(store: MlflowClient, tiny: Path, half: Any) -> None:
    before = sorted(p.name for p in run_dir().iterdir())
    changed = ("training.learning_rate=0.1", "training.weight_decay=0", "training.batch_size=3", "model.n_layer=3")
    assert "begin a new run from this checkpoint with --fork" in refused(train(tiny, *changed[:3], resume="latest"))
    result = train(tiny, *changed, "tracking.experiment=forks", resume="latest", fork=True)
    assert result.exit_code == 0, result.output
    fork = only_run(store, "forks")
    assert [step for step, _ in history(store, fork.info.run_id, "train/loss")] == [4, 5, 6]
    assert [value for _, value in history(store, fork.info.run_id, "progress/tokens_seen")] == [72, 96, 120]
    origin = f"runs:/{half.info.run_id}/checkpoints/{checkpoint.list_all(CHECKPOINTS)[0].name}/checkpoint_3.pt"
    assert fork.data.tags["bdh.forked_from"] == origin
    assert fork.data.tags["drift.training.learning_rate"] == "0.001 -> 0.1"
    old, new = checkpoint.list_all(CHECKPOINTS)
    assert sorted(p.name for p in old.iterdir()) == before
    state = checkpoint.load(new / "checkpoint_6.pt")
    assert state["optimizer_state_dict"]["param_groups"][0]["weight_decay"] == 0
    assert only_run(store).info.run_id == half.info.run_id


def test_fork_may_read_other_data_from_its_beginning(store: MlflowClient, text: Path, tiny: Path, half: Any) -> None:
    shutil.copy(text / "part-0.parquet", text / "part-2.parquet")
    result = train(tiny, "tracking.experiment=forks", resume="latest", fork=True)
    assert result.exit_code == 0, result.output
    assert "fork: other data or another order of it, so it is read from its beginning" in result.output


def test_fork_cannot_change_shapes_and_needs_a_checkpoint(store: MlflowClient, tiny: Path, half: Any) -> None:
    output = refused(train(tiny, "model.n_embd=32", "training.seed=7", resume="latest", fork=True))
    assert "model.n_embd was 16, config says 32" in output
    assert "training.seed" not in output
    output = refused(train(tiny, "low_precision.optimizer_bits=8", resume="latest", fork=True))
    assert "low_precision.optimizer_bits was 32, config says 8" in output
    assert "--fork needs a checkpoint to fork from: --resume TARGET" in refused(train(tiny, fork=True))


def test_copy_of_a_checkpoint_elsewhere_continues_in_the_runs_own_directory(store: MlflowClient, tiny: Path, half: Any) -> None:
    directory = run_dir()
    elsewhere = Path("best")
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text("mine: true\n")
    for suffix in ("pt", "json"):
        shutil.copy(directory / f"checkpoint_3.{suffix}", elsewhere)
    before = sorted(p.name for p in elsewhere.iterdir())
    assert train(tiny, resume="best/checkpoint_3.pt").exit_code == 0
    assert (elsewhere / "config.yaml").read_text() == "mine: true\n"
    assert sorted(p.name for p in elsewhere.iterdir()) == before
    assert loaded(6)["step"] == 6
    assert only_run(store).data.tags["bdh.latest_checkpoint"] == f"checkpoints/{directory.name}/checkpoint_6.pt"


@pytest.mark.slow  # float16 on a CPU; other forks are quick tests
def test_fork_may_change_number_format_and_schedule(store: MlflowClient, tiny: Path, half: Any) -> None:
    changed = ("low_precision.compute_dtype=float16", "scheduler.type=cosine", "scheduler.warmup_steps=6", "training.max_iters=12")
    result = train(tiny, *changed, "tracking.experiment=forks", resume="latest", fork=True)
    assert result.exit_code == 0, result.output
    rates = [value for _, value in history(store, only_run(store, "forks").info.run_id, "optim/lr")]
    assert rates[:3] == pytest.approx([4e-3 / 6, 5e-3 / 6, 1e-3])  # its own warm-up and decay, not the origin's
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_pull_brings_a_mirrored_checkpoint_here(tiny: Path, half: Any) -> None:
    directory = run_dir()
    shutil.rmtree(CHECKPOINTS)
    result = run_cli("checkpoints", "pull", half.info.run_id, "--config", str(tiny))
    assert result.output.strip() == str((directory / "checkpoint_3.pt").absolute())
    checkpoint.verify(checkpoint.describe(directory / "checkpoint_3.pt"))


def test_evaluation_missed_by_an_interruption_is_made_up_for(
    store: MlflowClient, text: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the step that is evaluated: the checkpoint is saved first, the evaluation follows in the next segment."""
    real = Tracker.metrics

    def interrupted(self: Tracker, values: Mapping[str, float], step: int) -> int:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return real(self, values, step)

    monkeypatch.setattr(Tracker, "metrics", interrupted)
    assert train(tiny).exit_code == 143
    run = only_run(store)
    assert run.info.status == "KILLED"
    assert (run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_step"]) == ("SIGTERM", "3")
    assert history(store, run.info.run_id, "val/loss") == []
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)
    monkeypatch.chdir(text.parent)
    assert train(tiny, resume="latest").exit_code == 0
    assert [step for step, _ in history(store, run.info.run_id, "val/loss")] == [3, 6]


@pytest.mark.slow  # trains in emulated FP8
def test_fork_into_fp8_begins_with_fresh_scales_and_one_out_of_it_forgets_them(store: MlflowClient, tiny: Path, half: Any) -> None:
    fp8 = ("low_precision.use_fp8=true", "fp8.emulate=true", "fp8.amax_history_len=4", "training.layer_form=reference")
    result = train(tiny, *fp8, "tracking.experiment=forks", resume="latest", fork=True)
    assert result.exit_code == 0, result.output
    assert only_run(store, "forks").data.tags["bdh.precision"].startswith("FP8 (hybrid")
    back = train(tiny, "tracking.experiment=back", "training.max_iters=7", resume=only_run(store, "forks").info.run_id, fork=True)
    assert back.exit_code == 0, back.output
    assert only_run(store, "back").data.tags["bdh.precision"].startswith("float32 matmuls")
