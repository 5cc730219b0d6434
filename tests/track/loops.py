"""The three loops as programs: python -m tests.track.loops plain|huggingface|lightning EVENT [RESUME], in the current folder.

40 steps, `loss` logged at each, a checkpoint every 10. EVENT happens after step 25: none, exception, or the name of a signal that the
program sends to itself. RESUME names a checkpoint of a run to go on with. A group of processes: the Hugging Face Trainer under torchrun,
Lightning with their number as DEVICES in the environment.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

STEPS, EVERY, AT = 40, 10, 25
DEVICES = int(os.environ.get("DEVICES", 1))


def happen(event: str, step: int) -> None:
    if step == AT and event == "exception":
        raise RuntimeError("no such layer")
    if step == AT and event.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[event])


def data() -> Any:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1))


def plain(event: str, resume: str | None) -> None:
    from bdh_mlflow import track

    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = data().tensors
    with track.run(track.Settings("plain", signals=event == "SIGTERM"), resume=resume) as run:
        if run.resumed_from is not None:
            model.load_state_dict(torch.load(run.resumed_from, weights_only=True))
        for step in range(run.first_step + 1, STEPS + 1):
            loss = (model(x)[:, 0] - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.metrics({"loss": loss}, step)
            happen(event, step)
            if step % EVERY == 0 or run.stop_requested:
                torch.save(model.state_dict(), "model.pt")
                run.checkpoint("model.pt", step)
            if run.stop_requested:
                break


def huggingface(event: str, resume: str | None) -> None:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

    from bdh_mlflow.track import Settings
    from bdh_mlflow.track.huggingface import TrackCallback

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.layer = torch.nn.Linear(8, 1)
            self.post_init()

        def forward(self, x: Any = None, labels: Any = None) -> dict[str, Any]:
            out = self.layer(x)[:, 0]
            return {"loss": (out - labels).square().mean(), "logits": out}

    class Happening(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            happen(event, state.global_step)

    rows = [{"x": x, "labels": y} for x, y in data()]
    arguments = TrainingArguments(
        "out", max_steps=STEPS, save_steps=EVERY, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_total_limit=1
    )
    callback = TrackCallback(Settings("huggingface", signals=event == "SIGTERM"), resume=resume)
    trainer = Trainer(Model(PretrainedConfig()), arguments, train_dataset=rows, callbacks=[callback, Happening()])
    trainer.train(resume_from_checkpoint=callback.resume_from_checkpoint)


def lightning(event: str, resume: str | None) -> None:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from bdh_mlflow.track.lightning import TrackLogger

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = (self.layer(batch[0])[:, 0] - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Happening(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            happen(event, trainer.global_step)

    logger = TrackLogger("lightning", resume=resume)
    saver = ModelCheckpoint(every_n_train_steps=EVERY, save_top_k=1, monitor="step", mode="max")
    trainer = Trainer(
        max_steps=STEPS, logger=logger, callbacks=[saver, Happening()], accelerator="cpu", log_every_n_steps=1, devices=DEVICES,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), torch.utils.data.DataLoader(data(), 16), ckpt_path=logger.ckpt_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    stack, event, *rest = sys.argv[1:]
    assert Path.cwd() != Path(__file__).parent
    {"plain": plain, "huggingface": huggingface, "lightning": lightning}[stack](event, *(rest or [None]))
