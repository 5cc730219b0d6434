"""Settings under the names that the program this one descends from has for them: what each is now, or why there is none."""

from typing import NamedTuple


class Former(NamedTuple):
    """successor: dotted key of ours, None if there is none.   reason: why, or what is different."""

    successor: str | None
    reason: str = ""


FORMER = {
    "training.runs_dir": Former("training.checkpoint_dir"),
    "training.compile_model": Former("training.compile"),
    "training.grad_accum_steps": Former("training.gradient_accumulation_steps"),
    "training.max_grad_norm": Former("training.grad_clip"),
    "training.eval_freq": Former("training.test_freq"),
    "training.use_tensorboard": Former(None, "curves are MLflow's; mlflow ui shows them"),
    "training.tensorboard_dir": Former(None, "curves are MLflow's; mlflow ui shows them"),
    "scheduler.T_max": Former("scheduler.decay_steps", "which counts from the first update, warm-up included"),
    "scheduler.warmup_type": Former(None, "warm-up is linear"),
    "scheduler.threshold": Former(None, "plateau counts a relative fall of the validation loss by 1e-4 as improvement, torch's default"),
    "scheduler.mode": Former(None, "plateau watches the validation loss, which falls"),
    "dataset.val_split": Former("dataset.val_fraction", "a share of documents, not of files"),
    "dataset.val_batches": Former("training.test_iters"),
    "dataset.train_ratio": Former(None, "dataset.val_fraction is the share of documents kept for validation"),
    "dataloader.persistent_workers": Former(None, "workers always stay"),
    "tokenizer.vocab_size": Former("model.vocab_size"),
    "tokenizer.model_path": Former("tokenizer.path"),
}
"""By dotted key."""
