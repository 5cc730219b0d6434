"""Prompt to text: a model in memory that continues prompts.

It uses the weights that training used, 4-bit values included; generation computes in float32. Imports neither MLflow nor the training loop,
as a served model needs neither.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdh_mlflow.config import Config, resolve
from bdh_mlflow.errors import InputError
from bdh_mlflow.inference import export
from bdh_mlflow.inference.memory import Memory
from bdh_mlflow.model import bdh, fp8, precision
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.model.precision import Precision
from bdh_mlflow.model.sampling import Sampler
from bdh_mlflow.vocabulary import Tokenizer

LONGEST_PROMPT = 65_536  # tokens; the default model needs minutes for as many on a CPU


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate, where it came from and its number formats.   run_id: its MLflow run, None for an exported file."""

    model: BDH
    tokenizer: Tokenizer
    config: Config
    path: Path
    step: int
    precision: Precision
    notes: tuple[str, ...]
    run_id: str | None = None


def from_file(path: Path) -> Loaded:
    """The model of an exported file.   Raises CheckpointError."""
    exported = export.read(path)
    formats = exported.config.low_precision
    notes = (f"trained in FP8, whose scales are not in the file; it computes in {formats.compute_dtype}",) if formats.use_fp8 else ()
    contents = Contents(exported.weights, export.runnable(exported), exported.tokenizer, {})
    return from_weights(contents, path, exported.step, notes)


class Contents(NamedTuple):
    """What a model is made of.   formats: the saved state of its number formats (`Precision.state_dict`)."""

    weights: dict[str, Tensor]
    config: Config
    tokenizer: Tokenizer
    formats: Mapping[str, Any]


def from_weights(contents: Contents, path: Path, step: int, notes: tuple[str, ...]) -> Loaded:
    """The model of a checkpoint's or an exported file's contents."""
    weights, config, tokenizer, formats = contents
    device = precision.pick_device()
    if config.low_precision.use_fp8 and not config.fp8.emulate and (reason := fp8.why_unavailable(device)):
        notes += (f"trained in FP8, which {reason}; evaluation emulates it",)
        config = dataclasses.replace(config, fp8=dataclasses.replace(config.fp8, emulate=True))
    network = BDH(config.to_bdh_config())
    network.load_state_dict(weights)
    network.to(device).eval()
    here = dataclasses.replace(config, training=dataclasses.replace(config.training, layer_form="auto", recompute="auto"))
    form = resolve(here, precision.machine(device)).config.training.layer_form
    assert form != "auto"
    network.use(form)
    runs = Precision.from_config(config, device)
    runs.prepare(network, bdh.PROJECTIONS)
    runs.load_state_dict(dict(formats))
    return Loaded(network, tokenizer, config, path, step, runs, notes)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature, top_k, top_p: see `model.sampling.Sampler`.   seed: None for new randomness each time.   stop: text that ends generation.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float | None = None
    seed: int | None = None
    stop: str = ""

    def __post_init__(self) -> None:
        """Raises InputError for a value that no text can be drawn with."""
        accepted = {
            "temperature": (not self.temperature < 0 and not math.isnan(self.temperature), "0 or more"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more, or none"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1, or none"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "0 to 2**63 - 1, or none"),
        }
        for name, (is_valid, words) in accepted.items():
            if not is_valid:
                raise InputError(f"{name}: {getattr(self, name)}; accepted: {words}")


def write(loaded: Loaded, prompt: str, max_new_tokens: int, sampling: Sampling = Sampling(), memory: Memory | None = None) -> Iterator[str]:
    """Continue a prompt, yielding text as it is generated; a character of several bytes is yielded when it is complete.

    memory: of the text before, and at the end of this text, too.   Raises InputError for a prompt that is too long: when called, not at the
    first piece.
    """
    return loaded.tokenizer.stream(map(int, _stream(loaded, [prompt], max_new_tokens, sampling, memory)))


def write_all(loaded: Loaded, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling = Sampling()) -> list[str]:
    """Continue several prompts of any lengths, together.   Raises InputError for one that is too long."""
    if not prompts:
        return []
    tokens = torch.cat(list(_stream(loaded, prompts, max_new_tokens, sampling)), dim=1).tolist()
    return [loaded.tokenizer.decode(token for token in row if token != bdh.STOPPED) for row in tokens]


def _stream(
    loaded: Loaded, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, memory: Memory | None = None
) -> Iterator[torch.Tensor]:
    tokenizer = loaded.tokenizer
    ids = [_encoded(tokenizer, "prompt", prompt) for prompt in prompts]
    if memory is not None:
        ids = [memory.reading(each) for each in ids]
    ids = [each or [tokenizer.separator] for each in ids]
    longest = max(map(len, ids))
    if longest > LONGEST_PROMPT:
        raise InputError(f"prompt of {longest:,} tokens; at most {LONGEST_PROMPT:,} are taken")
    device = loaded.precision.device
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    written = loaded.model.stream(
        [torch.tensor(row, device=device) for row in ids],
        max_new_tokens,
        Sampler(sampling.temperature, sampling.top_k, sampling.top_p),
        stop=_encoded(tokenizer, "stop", sampling.stop),
        generator=generator,
        state=None if memory is None else memory.state,
    )
    return written if memory is None else memory.written(written, sum(map(len, ids)))


def _encoded(tokenizer: Tokenizer, name: str, text: str) -> list[int]:
    try:
        return tokenizer.encode(text)
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: holds {text[error.start]!r}, half of a surrogate pair; accepted: text that UTF-8 can hold") from None
