"""The loop, with a toy model and lists as tracker, disk and screen."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bdh_mlflow.config import TrainingConfig
from bdh_mlflow.text import Sample
from bdh_mlflow.training.parts import Ending
from bdh_mlflow.training.passes import seed_pass
from bdh_mlflow.training.stop import StopRequest
from tests.training.bench import SAMPLES, Bench, Item, Toy, bench, items


def test_things_happen_at_their_frequencies_and_at_the_last_step() -> None:
    b = bench()
    ending = b.trainer.run()
    assert b.log.steps_of("train/loss") == [4, 8, 10]
    assert b.log.steps_of("val/loss") == [5, 10]
    assert b.log.written == [(SAMPLES, 5), (SAMPLES, 10)]
    assert b.saved_steps == [6, 10]
    assert b.log.steps == list(range(1, 11))
    assert ending.evaluation is not None
    assert ending.evaluation.loss == b.log.values_of("val/loss")[-1]
    assert ending == Ending("finished", 10, ending.evaluation, SAMPLES)


def test_checkpoint_of_an_evaluated_step_knows_its_validation_loss() -> None:
    b = bench(test_freq=3, checkpoint_freq=2, max_iters=6)
    b.trainer.run()
    assert [(state["step"], loss is not None) for state, loss in b.saved] == [(2, False), (4, False), (6, True)]


def test_logged_loss_is_the_mean_since_the_last_point() -> None:
    every = bench(log_freq=1)
    every.trainer.run()
    some = bench(log_freq=5)
    some.trainer.run()
    losses = every.log.values_of("train/loss")
    assert some.log.values_of("train/loss") == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def test_schedule_counts_optimizer_steps_whatever_the_accumulation() -> None:
    b = bench(gradient_accumulation_steps=3, log_freq=1, max_iters=4)
    b.trainer.run()
    assert b.log.values_of("optim/lr") == [0.1, 0.05, 0.1 / 3, 0.025]
    assert b.log.values_of("progress/tokens_seen") == [24, 48, 72, 96]
    assert b.saved[-1][0]["data_position"] == {"next": 12}


def test_accumulated_gradient_is_that_of_the_whole_batch() -> None:
    class Whole(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Identity()

    def merged() -> Iterator[Item]:
        source = items()
        while True:
            pair = [next(source), next(source)]
            yield Item(torch.cat([i.tokens for i in pair]), pair[1].position, pair[1].epoch)

    parts = bench(gradient_accumulation_steps=2, max_iters=3, model=Whole())  # no randomness: Whole has no dropout
    whole = bench(batches=merged(), max_iters=3, model=Whole())
    parts.trainer.run()
    whole.trainer.run()
    assert torch.allclose(parts.model.table, whole.model.table, atol=1e-6)


@pytest.mark.parametrize("interruption", range(1, 10))
def test_stopping_and_resuming_gives_the_same_bytes(interruption: int) -> None:
    straight = bench(gradient_accumulation_steps=2)
    straight.trainer.run()
    first = bench(gradient_accumulation_steps=2)
    _stop_after(first, interruption)
    assert first.trainer.run().reason == "SIGTERM"
    state = first.saved[-1][0]
    assert state["step"] == interruption
    second = bench(gradient_accumulation_steps=2, batches=items(state["data_position"]["next"]))
    torch.manual_seed(99)
    second.trainer.load_state_dict(state)
    second.trainer.run()
    assert torch.equal(straight.model.table, second.model.table)
    known = {(k, s): v for k, s, v in straight.log.points if k in ("train/loss", "val/loss", "optim/grad_norm")}
    again = {(k, s): v for k, s, v in first.log.points + second.log.points if k in ("train/loss", "val/loss", "optim/grad_norm")}
    assert again == known


def _stop_after(b: Bench, step: int) -> None:
    real = b.log.advance

    def advance(now: int, loss: float, tokens_per_s: float) -> None:
        real(now, loss, tokens_per_s)
        if now == step:
            b.stop.handle(signal.SIGTERM, None)

    b.log.advance = advance  # type: ignore[method-assign]


@pytest.mark.parametrize("phase", ["evaluation", "sampling"])
def test_signal_cuts_an_evaluation_short_and_the_step_is_saved(phase: str) -> None:
    stop = StopRequest(begun=True)

    class Late(Toy):
        def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
            if not self.training and phase == "evaluation":
                stop.handle(signal.SIGINT, None)
            return super().forward(idx, targets)

    def samples(stopped: Callable[[], bool]) -> list[Sample]:
        stop.handle(signal.SIGINT, None)
        return [] if stopped() else SAMPLES

    b = bench(model=Late(), parts={"samples": samples, "stop": stop})
    ending = b.trainer.run()
    assert (ending.reason, ending.step, b.saved_steps, b.log.written) == ("SIGINT", 5, [5], [])
    assert b.log.steps_of("val/loss") == ([] if phase == "evaluation" else [5])


def test_loop_reads_from_the_device_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of all passes and the gradient norm come in one transfer; each read of a tensor's value would wait for the device."""

    class Reads(TorchDispatchMode):
        """Counts what `Tensor.item`, `float(tensor)` and `if tensor` do."""

        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    lists: list[int] = []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or real(tensor))
    b = bench(gradient_accumulation_steps=3, max_iters=4, test_freq=100, parts={"validation": []})
    with Reads() as reads:
        b.trainer.run()
    assert (lists, reads.count) == ([4] * 4, 0)


def test_logged_loss_of_accumulated_passes_is_their_sum_in_order() -> None:
    b = bench(gradient_accumulation_steps=3, log_freq=1, max_iters=1)
    losses = []
    model, source = Toy(), items()
    for number in range(3):
        seed_pass(TrainingConfig().seed, 0, number)
        tokens = next(source).tokens.long()
        losses.append(model(tokens[:, :-1], tokens[:, 1:])[1].item())
    b.trainer.run()
    assert b.log.values_of("train/loss") == [losses[0] / 3 + losses[1] / 3 + losses[2] / 3]


def test_metrics_of_the_model_stand_beside_the_validation_loss() -> None:
    b = bench()
    b.trainer.run()
    assert b.log.steps_of("seen") == b.log.steps_of("val/loss") == [5, 10]


def test_losses_are_logged_on_the_axis_of_tokens_too() -> None:
    b = bench(log_freq=5)
    b.trainer.run()
    assert b.log.values_of("by_tokens/train_loss") == b.log.values_of("train/loss")
    assert b.log.values_of("by_tokens/val_bpb") == b.log.values_of("val/bpb")


def test_evaluation_and_samples_leave_the_training_randomness_alone() -> None:
    often = bench(test_freq=1)
    often.trainer.run()
    never = bench(test_freq=1000)
    never.trainer.run()
    assert torch.equal(often.model.table, never.model.table)


def test_schedule_observes_evaluations_of_its_cadence_only() -> None:
    b = bench(test_freq=4)
    b.trainer.run()
    assert b.log.steps_of("val/loss") == [4, 8, 10]
    assert b.rate.observed == b.log.values_of("val/loss")[:2]


def test_finished_run_has_nothing_left_to_do() -> None:
    b = bench()
    b.trainer.run()
    again = bench()
    again.trainer.load_state_dict(b.saved[-1][0])
    assert again.trainer.run() == Ending("finished", 10, None, ())
    assert (again.saved, again.log.points) == ([], [])
