"""What tracking costs other trainers' loops: `python benchmarks/loops.py [--rounds 5] [--large | --endings] [--stacks plain ...]`.

Each of three stacks trains the same network of about 10 ms a step on one thread, 1,000 steps, logs at each and saves every 100:
without tracking (`none`; in Lightning a logger that does nothing), with its own MLflow integration (`own`: MLflow's asynchronous calls and
log_artifact in the plain loop, MLflowCallback with HF_MLFLOW_LOG_ARTIFACTS, MLFlowLogger(log_model="all")), and with `bdh_mlflow.track`
(`ours`), against `mlflow server` on this machine. Rounds are interleaved; figures are medians over them, with the lowest and highest.

turn: from one forward pass to the next. calls: median time of the call that logs a step. overhead: median turn less that without
tracking in the same round, which the work of the other processes on the machine is part of. p99: of all turns but those
with a checkpoint. checkpoint: how long one holds the loop, turn less median turn; in the plain loop the tracker's call alone, against
copying the bytes of its file at that moment (`x copy`), in the others against the same without tracking (`x none`). exit: from the last
forward pass to the end of the process. points: that arrived, of those that the loop has logged. --large: 60 steps of a network of 25 M
parameters, checkpoints of 300 MB at 20, 40 and 60, of which the checkpoint columns mean something. Needs a quiet machine, and where others
use it too, many rounds: the same loop takes up to 1 ms a step more or less from one round to the next.

--endings: instead, how runs end. After step 150 of 300 an exception, SIGTERM, SIGKILL, or the server is killed; then the status of the run
and the points that arrived, of 150, or of 300 where the loop goes on; its exit code, and how long it lived on after that step; what takes
longer than 60 s is killed. Where the server was killed it is started again, and `track.sync` delivers what is left. MLflow's own retries
are as it sets them.
"""

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

ENVIRONMENT = dict(os.environ)  # before `track.sync` bounds MLflow's retries here
EVENTS = ("exception", "SIGTERM", "SIGKILL", "server")
LIMIT_S = 60
STACKS, TRACKERS = ("plain", "huggingface", "lightning"), ("none", "own", "ours")
WIDTH, BATCH = 512, 64


class Size(NamedTuple):
    hidden: int
    steps: int
    every: int


SIZES = {"small": Size(1024, 1000, 100), "endings": Size(1024, 300, 100), "large": Size(24_000, 60, 20)}


class Result(NamedTuple):
    turns: list[float]
    calls: list[float]
    saved: list[float]
    copied: list[float]
    exit_s: float
    points: str


# ---- the loops, each in a process of its own -------------------------------------------------------------------------------------------


def network(size: Size) -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(WIDTH, size.hidden), torch.nn.ReLU(), torch.nn.Linear(size.hidden, WIDTH))


def batch() -> Any:
    import torch

    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))


def values(loss: float, step: int) -> dict[str, float]:
    return {"loss": loss, "lr": 1e-3, "norm": 1.0, "rate": 10.0 * step, "epoch": step / 100, "seen": float(step)}


CALLS: list[float] = []
"""How long each call took that logs a step."""


def timed(call: Any) -> Any:
    def timing(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            CALLS.append(time.perf_counter() - began)

    return timing


def plain(tracker: str, size: Size, forward: Any) -> list[float]:
    """Returns how long copying each checkpoint took."""
    import torch

    model, x, copied = network(size), batch(), []
    optimizer = torch.optim.AdamW(model.parameters())
    run: Any = contextlib.nullcontext()
    if tracker == "own":
        import mlflow

        mlflow.set_experiment("plain-own")
        run = mlflow.start_run()
    if tracker == "ours":
        from bdh_mlflow import track

        run = track.run("plain-ours", note=lambda text: None)
    with run:
        for step in range(1, size.steps + 1):
            forward()
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if tracker == "own":
                timed(mlflow.log_metrics)(values(loss.item(), step), step, synchronous=False)
            if tracker == "ours":
                timed(run.metrics)(values(loss.item(), step), step)
            if step % size.every == 0:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "state.pt")
                forward("saved")
                if tracker == "own":
                    mlflow.log_artifact("state.pt", f"checkpoints/{step}")
                if tracker == "ours":
                    run.checkpoint("state.pt", step)
                forward("held")
                began = time.perf_counter()
                shutil.copyfile("state.pt", "copy.pt")
                copied.append(time.perf_counter() - began)
                forward("copied")
    return copied


def huggingface(tracker: str, size: Size, forward: Any) -> list[float]:
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments
    from transformers.integrations import MLflowCallback

    class Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.net = network(size)
            self.post_init()

        def forward(self, x: Any = None) -> dict[str, Any]:
            forward()
            return {"loss": (self.net(x) - x).square().mean()}

    callbacks: list[Any] = []
    if tracker == "ours":
        from bdh_mlflow.track.huggingface import TrackCallback

        callbacks = [TrackCallback("huggingface-ours", note=lambda text: None)]
    os.environ |= {"HF_MLFLOW_LOG_ARTIFACTS": "1", "MLFLOW_EXPERIMENT_NAME": "huggingface-own"}
    arguments = TrainingArguments(
        "out",
        max_steps=size.steps,
        save_steps=size.every,
        logging_steps=1,
        per_device_train_batch_size=BATCH,
        report_to="mlflow" if tracker == "own" else "none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"x": row} for row in batch()] * 8
    trainer = Trainer(Model(PretrainedConfig()), arguments, train_dataset=rows, callbacks=callbacks)
    for callback in trainer.callback_handler.callbacks:
        if callback in callbacks or isinstance(callback, MLflowCallback):
            callback.on_log = timed(callback.on_log)
    trainer.train()
    return []


def lightning(tracker: str, size: Size, forward: Any) -> list[float]:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import MLFlowLogger
    from lightning.pytorch.loggers.logger import DummyLogger

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(size)

        def training_step(self, rows: Any, index: int) -> Any:
            forward()
            loss = (self.net(rows[0]) - rows[0]).square().mean()
            self.log_dict(values(float(loss), index))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    logger: Any = DummyLogger()  # without a logger, Lightning does not work out what it would log
    if tracker == "own":
        logger = MLFlowLogger("lightning-own", tracking_uri=os.environ["MLFLOW_TRACKING_URI"], log_model="all", synchronous=False)
    if tracker == "ours":
        from bdh_mlflow.track.lightning import TrackLogger

        logger = TrackLogger("lightning-ours", note=lambda text: None)
    logger.log_metrics = timed(logger.log_metrics)
    saver = ModelCheckpoint("out", every_n_train_steps=size.every, save_top_k=-1)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(batch().repeat(size.steps, 1)), BATCH)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    Trainer(max_steps=size.steps, logger=logger, callbacks=[saver], accelerator="cpu", **quiet).fit(Model(), rows)
    return []


def happen(event: str) -> None:
    """What ends a loop, or its server."""
    Path("happened").write_text(str(time.time()))
    if event == "exception":
        raise RuntimeError("no such layer")
    if event == "server":
        os.killpg(int(os.environ["LOOPS_SERVER"]), signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.Signals[event])


def worker(stack: str, tracker: str, size: Size, event: str = "") -> None:
    """Run a loop and write down when what began."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    moments: list[tuple[str, float]] = []

    def forward(what: str = "forward") -> None:
        moments.append((what, time.time()))
        if event and what == "forward" and sum(each == what for each, _ in moments) == size.steps // 2 + 1:
            happen(event)

    copied = {"plain": plain, "huggingface": huggingface, "lightning": lightning}[stack](tracker, size, forward)
    Path("moments.json").write_text(json.dumps({"moments": moments, "copied": copied, "calls": CALLS}))


# ---- measuring -------------------------------------------------------------------------------------------------------------------------


def measured(stack: str, tracker: str, size: Size, uri: str) -> Result:
    with tempfile.TemporaryDirectory(prefix="loops-") as folder:
        environment = {**ENVIRONMENT, "MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", stack, tracker, *map(str, size)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        ended = time.time()
        if done.returncode:
            sys.exit(f"{stack}, {tracker}: {done.stderr}")
        said = json.loads((Path(folder) / "moments.json").read_text())
    starts: list[float] = []
    spent: dict[int, dict[str, float]] = {}
    before = 0.0
    for what, at in said["moments"]:
        if what == "forward":
            starts.append(at)
        else:
            spent.setdefault(len(starts), {})[what] = at - before
        before = at
    pairs = enumerate(itertools.pairwise(starts), 1)
    turns = [later - earlier - spent.get(n, {}).get("copied", 0.0) for n, (earlier, later) in pairs]
    usual = statistics.median(turns)
    at_checkpoints = range(size.every, size.steps, size.every)  # not the last, after which there is no turn
    saved = [turns[step - 1] - usual for step in at_checkpoints]
    if stack == "plain" and tracker != "none":  # its own write is the loop's, not the tracker's
        saved = [spent[step]["held"] for step in at_checkpoints]
    others = [turn for step, turn in enumerate(turns, 1) if step % size.every]
    points = "" if tracker == "none" else arrived(uri, f"{stack}-{tracker}", size)
    return Result(others, said["calls"], saved, said["copied"], ended - starts[-1], points)


def ended(stack: str, tracker: str, event: str, server: Any) -> list[str]:
    """How a run ends: status, points, exit code, seconds that the process lived on."""
    size = SIZES["endings"]
    with tempfile.TemporaryDirectory(prefix="loops-") as folder:
        environment = {**ENVIRONMENT, "MLFLOW_TRACKING_URI": server.uri, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        environment |= {"OMP_NUM_THREADS": "1", "LOOPS_SERVER": str(os.getpgid(server.pids()[0]))}
        command = [sys.executable, __file__, "--worker", stack, tracker, *map(str, size), event]
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        happened = Path(folder) / "happened"
        while process.poll() is None and not (happened.exists() and time.time() - float(happened.read_text()) > LIMIT_S):
            time.sleep(0.05)
        cut = process.poll() is None
        if cut:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        lived = time.time() - float(happened.read_text())
        if event == "server":
            server.start()
        if tracker == "ours":
            from bdh_mlflow import track

            time.sleep(2 if event == "SIGKILL" else 0)  # its sender lives on
            track.sync(Path(folder) / "checkpoints", note=lambda text: None)
        points = arrived(server.uri, f"{stack}-{tracker}", size)
    return [points, "cut off" if cut else str(code), f"{lived:.1f}"]


def arrived(uri: str, experiment: str, size: Size) -> str:
    """Points of `loss` of the newest run, and its status."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    run = client.search_runs([found.experiment_id], max_results=1)[0]
    steps = {m.step for m in client.get_metric_history(run.info.run_id, "loss")}
    return f"{len(steps)}/{size.steps} {run.info.status}"


def spread(figures: list[float], unit: float, digits: int = 1) -> str:
    ordered = sorted(figure * unit for figure in figures)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def p99(figures: list[float]) -> float:
    return statistics.quantiles(figures, n=100)[98]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], Size(*map(int, sys.argv[4:7])), *sys.argv[7:])
        return
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--large", action="store_true")
    options.add_argument("--endings", action="store_true")
    options.add_argument("--stacks", nargs="+", choices=STACKS, default=STACKS)
    given = options.parse_args()
    if given.endings:
        print_endings(given.stacks)
    else:
        print_costs(given.stacks, SIZES["large" if given.large else "small"], given.rounds)


def serving(home: str) -> Any:
    from scripts.servers import Server  # here: it imports MLflow, which the loops are to do themselves

    return Server(None, Path(home))


def print_endings(stacks: list[str]) -> None:
    print("| loop | tracked by | what happens | points and status | exit code | s until the end |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="loops-server-") as home:
        server = serving(home)
        try:
            for stack, tracker, event in itertools.product(stacks, TRACKERS[1:], EVENTS):
                print(f"| {' | '.join([stack, tracker, event, *ended(stack, tracker, event, server)])} |", flush=True)
        finally:
            server.signal(signal.SIGKILL)


def print_costs(stacks: list[str], size: Size, rounds_: int) -> None:
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="loops-server-") as home:
        server = serving(home)
        try:
            for number in range(rounds_):
                for stack in stacks:
                    for tracker in TRACKERS:
                        print(f"round {number + 1} of {rounds_}: {stack}, {tracker}", file=sys.stderr, flush=True)
                        results.setdefault((stack, tracker), []).append(measured(stack, tracker, size, server.uri))
        finally:
            server.signal(signal.SIGKILL)
    print("| loop | tracked by | turn ms | calls ms | overhead ms | p99 ms | checkpoint ms | against | exit s | points |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (stack, tracker), rounds in results.items():
        base = results[stack, "none"]
        over = [statistics.median(own.turns) - statistics.median(none.turns) for own, none in zip(rounds, base, strict=True)]
        held = [statistics.median(r.saved) for r in rounds]
        if stack == "plain" and tracker != "none":
            ratio = f"{statistics.median(h / statistics.median(r.copied) for h, r in zip(held, rounds, strict=True)):.2f} x copy"
        else:
            ratio = f"{statistics.median(h / statistics.median(n.saved) for h, n in zip(held, base, strict=True)):.2f} x none"
        cells = [
            stack, tracker, spread([statistics.median(r.turns) for r in rounds], 1e3),
            "" if tracker == "none" else spread([statistics.median(r.calls) for r in rounds], 1e3, 3),
            "" if tracker == "none" else spread(over, 1e3, 2),
            spread([p99(r.turns) for r in rounds], 1e3), spread(held, 1e3), "" if tracker == "none" else ratio,
            spread([r.exit_s for r in rounds], 1), ", ".join(dict.fromkeys(r.points for r in rounds)),
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
