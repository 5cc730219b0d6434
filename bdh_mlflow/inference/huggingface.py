"""Export of a model to a folder that Hugging Face transformers opens, without this package: weights, tokenizer, code and a model card.

Weights are those that the run was evaluated with: 4-bit values where it was trained for them, in float32. The code is `modeling_bdh.py`,
copied, for `trust_remote_code=True`; nothing of it is run here, and transformers is not needed to write the folder.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from bdh_mlflow import __version__
from bdh_mlflow.checkpoint import Manifest
from bdh_mlflow.errors import InputError, SaveError
from bdh_mlflow.files import reason_of, shown
from bdh_mlflow.inference.generate import Loaded
from bdh_mlflow.model.bdh import PROJECTIONS
from bdh_mlflow.vocabulary.convert import separator_name, tokenizer_json

CODE = "modeling_bdh"
WEIGHTS = "model.safetensors"
LONGEST = 10**30  # what transformers writes for no limit to a text


def write(folder: Path, loaded: Loaded, manifest: Manifest) -> int:
    """Write a new or empty folder, all or nothing.   manifest: of the checkpoint.   Returns its bytes.

    Raises InputError for a folder that cannot become the result, and for a model or tokenizer that transformers cannot run; SaveError.
    """
    if loaded.config.low_precision.use_fp8:
        raise InputError(
            f"{loaded.path}: trained in FP8, whose scaled products transformers does not compute; accepted: other number formats"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{shown(folder)}: there already, and not an empty folder; give another name or remove it first")
    texts = {
        "config.json": _json(_config(loaded)),
        "generation_config.json": _json(_special(loaded)),
        "tokenizer.json": tokenizer_json(loaded.tokenizer).decode(),
        "tokenizer_config.json": _json(_tokenizer_config(loaded)),
        f"{CODE}.py": resources.files("bdh_mlflow.inference").joinpath(f"{CODE}.py").read_text(encoding="utf-8"),
        "README.md": card(loaded, manifest),
    }
    there = folder.is_dir()  # a current folder or a mount point cannot be replaced
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if there else folder.absolute().parent
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.absolute().name[:50]}.", suffix=".partial", dir=beside))
        try:
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            save_file(_weights(loaded), partial / WEIGHTS, metadata={"format": "pt"})
            (partial / WEIGHTS).chmod(0o644)
            size = sum(file.stat().st_size for file in partial.iterdir())
            if there:
                for file in sorted(partial.iterdir()):
                    file.rename(folder / file.name)
            else:
                partial.chmod(0o755)
                partial.replace(folder)
        finally:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(partial)
    except OSError as error:
        raise SaveError(f"{shown(folder)}: not written: {reason_of(error)}") from error
    return size


def card(loaded: Loaded, manifest: Manifest) -> str:
    """The model card: what it is, how it is used, where it comes from, and how good it is."""
    config, tokenizer = loaded.config, loaded.tokenizer
    tokens = "bytes" if tokenizer.digest is None else f"{tokenizer.size:,} tokens ({tokenizer.kind}, digest {tokenizer.digest})"
    rounded = f"{config.low_precision.quantization_type} values in float32" if config.low_precision.use_4bit else "float32"
    figures = [("step", f"{manifest.step:,}"), ("tokens seen", f"{manifest.tokens_seen:,}"), ("parameters", f"{config.parameters:,}")]
    if manifest.val_loss is not None:
        figures.append(("val/loss, nats per token", f"{manifest.val_loss:.4f}"))
    if manifest.val_bpb is not None:
        figures.append(("val/bpb, bits per byte of text", f"{manifest.val_bpb:.4f}"))
    origin = [
        ("MLflow run", manifest.mlflow_run_id or "not delivered yet"),
        ("checkpoint", manifest.artifact_path),
        ("sha256 of the checkpoint", manifest.files[0].sha256),
        ("digest of the training data", manifest.data_digest),
        ("git commit", f"{manifest.git_commit or 'unknown'}{' (with uncommitted changes)' if manifest.git_dirty else ''}"),
        ("vocabulary", tokens),
        ("weights", rounded),
        ("exported by", f"bdh-mlflow {__version__}"),
    ]
    settings = yaml.safe_dump(config.portable(), sort_keys=False).rstrip()
    return CARD.format(figures=_table(figures), origin=_table(origin), config=settings, name=manifest.run_dir)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [bdh, bdh-mlflow]
---

# BDH, {name}

A BDH language model ("Dragon Hatchling", arXiv:2509.26507). Its code is in this folder and runs with `trust_remote_code=True`; it needs
torch, safetensors and transformers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
prompt = tokenizer("def ", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```

## How good it is

{figures}

## Where it comes from

{origin}

## Settings of the training

```yaml
{config}
```
"""


def _config(loaded: Loaded) -> Mapping[str, Any]:
    model = loaded.config.to_bdh_config()
    return {
        "model_type": "bdh",
        "architectures": ["BDHForCausalLM"],
        "auto_map": {"AutoConfig": f"{CODE}.BDHConfig", "AutoModelForCausalLM": f"{CODE}.BDHForCausalLM"},
        **vars(model),
        **_special(loaded),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def _special(loaded: Loaded) -> Mapping[str, int]:
    """The separator begins a text, ends it and fills up."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), loaded.tokenizer.separator)


def _tokenizer_config(loaded: Loaded) -> Mapping[str, Any]:
    """Of `tokenizer.json`, as it is: nothing is added to a text, and special tokens that it spells out are text."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": separator_name(loaded.tokenizer),
        "pad_token": separator_name(loaded.tokenizer),
        "padding_side": "left",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": LONGEST,
    }


def _weights(loaded: Loaded) -> dict[str, Tensor]:
    view, model = loaded.model.weight_view, loaded.model
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name in PROJECTIONS if view is not None else ():
        assert view is not None
        state[name] = view(name, model.get_parameter(name)).detach().float().cpu().contiguous()
    return state


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
