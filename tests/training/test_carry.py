"""Rows that read on: states go from update to update, into checkpoints and back, and are those of the last update that was made."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor

from bdh_mlflow import checkpoint
from bdh_mlflow.checkpoint import files
from bdh_mlflow.distributed import ALONE, World
from bdh_mlflow.errors import DataError, ResumeError, StoppedError
from bdh_mlflow.model.recurrent import RecurrentState
from bdh_mlflow.training.carry import Carry
from bdh_mlflow.training.parts import Stream
from tests.conftest import history, only_run, run_cli, train
from tests.training.bench import Toy, bench, items

CARRY = ("training.carry_state=true", "training.gradient_accumulation_steps=2")


def fresh(rows: int) -> RecurrentState:
    return RecurrentState([torch.zeros(rows, 1)])


class Adding(Toy):
    """Its state is the sum of the tokens that a row has read."""

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: Any = None) -> tuple[Tensor, Tensor | None]:
        logits, loss = super().forward(idx, targets)
        if state is not None:
            state.layers[0] = state.layers[0] + idx.sum(dim=1, keepdim=True)
            if loss is not None and not self.training:
                loss = loss * 0 + state.layers[0].mean()  # an evaluation shows what was carried into it
        return logits, loss


def read(count: int) -> Tensor:
    """Sums of what rows 0 to 3 have read after so many updates of two passes."""
    tokens = [item.tokens[:, :-1].sum(dim=1, keepdim=True).float() for item, _ in zip(items(), range(2 * count), strict=False)]
    return torch.cat([sum(tokens[::2], torch.zeros(2, 1)), sum(tokens[1::2], torch.zeros(2, 1))])


def reading(**how: Any) -> Any:
    return bench(model=Adding(), gradient_accumulation_steps=2, parts={"carry": Carry(fresh, 2, 2, ALONE), **how}, checkpoint_freq=3)


def test_a_row_reads_on_where_it_ended_and_its_state_is_saved() -> None:
    b = reading()
    b.trainer.run()
    assert b.saved_steps == [3, 6, 9, 10]
    for state, _ in b.saved:
        assert torch.equal(state["carried_state"]["layers"][0], read(state["step"]))
    resumed = reading(batches=items(12))
    resumed.trainer.load_state_dict(b.saved[1][0])
    resumed.trainer.run()
    assert torch.equal(resumed.saved[-1][0]["carried_state"]["layers"][0], read(10))
    assert torch.equal(b.saved[1][0]["carried_state"]["layers"][0], read(6)), "what was handed in stays as it is"


def test_an_update_that_fails_leaves_the_states_of_before() -> None:
    def ending() -> Any:
        for number, item in enumerate(items()):
            if number == 9:  # the second pass of the fifth update
                raise DataError("unreadable")
            yield item

    b = reading(batches=ending())
    with pytest.raises(StoppedError):
        b.trainer.run()
    assert (b.saved_steps[-1], b.saved[-1][0]["data_position"]) == (4, {"next": 8})
    assert torch.equal(b.saved[-1][0]["carried_state"]["layers"][0], read(4))


def test_evaluation_reads_the_stream_with_and_without_a_state_from_its_beginning() -> None:
    windows = [torch.ones(2, 5, dtype=torch.uint8)] * 3
    b = reading(stream=Stream(windows, 1.0))
    b.trainer.run()
    assert b.log.steps_of("val/loss_stream") == b.log.steps_of("val/loss_carried") == [5, 10]
    assert b.log.values_of("val/loss_carried") == [pytest.approx((4 + 8 + 12) / 3)] * 2


def test_each_process_has_the_rows_of_its_passes() -> None:
    class Second(World):
        rank, size = 1, 2

    whole = {"layers": [torch.arange(8.0).view(8, 1)]}
    second = Carry(fresh, 2, 4, Second())
    second.load_state_dict(whole)
    assert second.begin(2).layers[0].flatten().tolist() == [4, 5]
    assert second.state_dict()["layers"][0].flatten().tolist() == [4, 5, 6, 7]
    second.load_state_dict({})
    assert second.begin(3).layers[0].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("layers", [[], [torch.zeros(8, 1)] * 2, [torch.zeros(4, 1)], [torch.zeros(8, 2)]])
def test_states_of_another_network_or_of_other_rows_are_refused(layers: list[Tensor]) -> None:
    with pytest.raises(ResumeError, match=r"carried_state has the shapes .*; this configuration needs \[\(8, 1\)\]"):
        Carry(fresh, 2, 4, ALONE).load_state_dict({"layers": layers})


def carried(run_dir: Path, step: int) -> list[Tensor]:
    layers: list[Tensor] = files.load(run_dir / f"checkpoint_{step}.pt")["carried_state"]["layers"]
    return layers


def test_a_training_carries_its_states_and_a_fork_begins_them_anew_where_the_order_changes(
    store: MlflowClient, text: Path, tiny: Path
) -> None:
    assert train(tiny, *CARRY).exit_code == 0
    run = only_run(store)
    (run_dir,) = checkpoint.list_all(Path("checkpoints"))
    assert [tuple(layer.shape) for layer in carried(run_dir, 6)] == [(4, 2, 32, 16)] * 2
    assert all(layer.abs().sum() > 0 for layer in carried(run_dir, 6))
    assert run.data.tags["bdh.carried_state"].startswith("4 rows, ")
    for name in ("val/loss", "val/loss_stream", "val/loss_carried", "val/bpb_carried"):
        assert [step for step, _ in history(store, run.info.run_id, name)] == [3, 6]
    last = {name: history(store, run.info.run_id, name)[-1][1] for name in ("val/loss_carried", "val/loss_stream")}
    measured = run_cli("evaluate", run.info.run_id, "--carry", "--config", str(tiny))
    assert f"val/loss_carried {last['val/loss_carried']:.4f}" in measured.output
    assert f"val/loss_stream {last['val/loss_stream']:.4f}: the same windows, each read alone" in measured.output
    logged = store.get_run(run.info.run_id).data.metrics
    assert logged["eval/text_loss_carried"] == pytest.approx(last["val/loss_carried"])
    assert logged["eval/text_loss_stream"] == pytest.approx(last["val/loss_stream"])
    refused = train(tiny, *CARRY, "training.carry_state=false", resume=str(run_dir))
    assert (refused.exit_code, "training.carry_state was true, config says false" in refused.output) == (2, True)
    forked = train(tiny, *CARRY, "training.max_iters=7", "training.batch_size=1", resume=str(run_dir), fork=True)
    assert forked.exit_code == 0, forked.output
    assert "read from its beginning" in forked.output
    (other,) = set(checkpoint.list_all(Path("checkpoints"))) - {run_dir}
    assert carried(other, 7)[0].shape[0] == 2
    half = train(tiny, *CARRY, "low_precision.compute_dtype=float16")
    assert (half.exit_code, "cannot be combined with training.carry_state true" in half.output) == (2, True)
    again = train(tiny, *CARRY, "training.max_iters=7", "model.dropout=0", resume=str(run_dir), fork=True)
    assert again.exit_code == 0, again.output
    assert "read from its beginning" not in again.output, "rows read on, with their states"
