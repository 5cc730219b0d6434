"""Which analyses are made of a model, with what, in which order."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdh_mlflow.analysis import activity, graph, repetition, selectivity, synapses
from bdh_mlflow.analysis.results import Finding
from bdh_mlflow.errors import InputError
from bdh_mlflow.model.bdh import BDH
from bdh_mlflow.vocabulary import Tokenizer

NAMES = ("activity", "repetition", "graph", "synapses", "selectivity")
LETTERS_NEEDED = repetition.WARM_UP
WORDS = 32
MAX_TOKENS = 2**13  # of text, whose activity is counted
SHORT = 256  # tokens; of shorter windows several are read one after the other


class Subject(NamedTuple):
    """What is looked at.   windows: (B, T) ids of validation text.   made_of: which checkpoint it is, for figures to say."""

    model: BDH
    tokenizer: Tokenizer
    windows: Sequence[Tensor]
    made_of: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is asked.

    names: of NAMES.   words: of the repetition probe.   layer, head: of synapses and selectivity; None is the middle layer.   text: that
    synapses are watched over; None is that of the first window, or of the first ones.   sentences: for selectivity.
    """

    names: tuple[str, ...] = ("activity", "repetition", "graph", "synapses")
    words: int = WORDS
    seed: int = 0
    layer: int | None = None
    head: int = 0
    text: str | None = None
    sentences: selectivity.Sentences | None = None


def check_names(names: Sequence[str], sentences: selectivity.Sentences | None) -> None:
    """Raises InputError for names of no analysis, and for one whose sentences are missing."""
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"{', '.join(unknown)}: no analysis of that name; accepted: {', '.join(NAMES)}")
    if "selectivity" in names and sentences is None:
        raise InputError("selectivity needs two sets of sentences: --sentences FILE")


def checked(plan: Plan, subject: Subject) -> Plan:
    """The plan with what it leaves open.   Raises InputError for what this model cannot be asked, before anything is computed."""
    check_names(plan.names, plan.sentences)
    layer = subject.model.config.n_layer // 2 if plan.layer is None else plan.layer
    synapses.check_place(subject.model, layer, plan.head)
    if not all(bool(torch.isfinite(weights).all()) for weights in subject.model.parameters()):
        raise InputError("the weights of this model are not all finite: there is nothing to see in them")
    if not subject.windows and {"activity", "synapses"} & set(plan.names) and (plan.text is None or "activity" in plan.names):
        raise InputError("there is no validation text (dataset.val_fraction is 0): name other text with --data")
    return dataclasses.replace(plan, layer=layer)


def findings(subject: Subject, plan: Plan) -> Iterator[Finding]:
    """Each analysis as it is done.   plan: checked.   Raises InputError for text that is too short."""
    assert plan.layer is not None, "it was checked"
    model, made_of = subject.model, subject.made_of
    was_training = model.training
    model.eval()
    try:
        for name in plan.names:
            if name == "activity":
                yield activity.analyze(model, _some(subject.windows), made_of)
            elif name == "repetition":
                yield repetition.analyze(model, letters_of(subject.tokenizer), plan.words, plan.seed, made_of)
            elif name == "graph":
                yield graph.analyze(model, plan.seed, made_of)
            elif name == "synapses":
                yield synapses.analyze(model, _text_ids(subject, plan), plan.layer, plan.head, subject.tokenizer.decode, made_of)
            elif plan.sentences is not None:
                ids = [subject.tokenizer.encode(sentence) for group in plan.sentences.sets for sentence in group]
                yield selectivity.analyze(model, plan.sentences, ids, (plan.layer, plan.head), plan.seed, made_of)
    finally:
        model.train(was_training)


def letters_of(tokenizer: Tokenizer) -> Tensor:
    """Ids of the letters that are one token each.   Raises InputError if they are too few for the repetition probe."""
    found = {letter: tokenizer.encode(letter) for letter in repetition.LETTERS}
    ids = sorted({ids[-1] for letter, ids in found.items() if ids and tokenizer.decode([ids[-1]]).strip() == letter})
    if len(ids) < LETTERS_NEEDED:
        raise InputError(f"repetition: the tokenizer has {len(ids)} tokens of single letters; {LETTERS_NEEDED} are needed")
    return torch.tensor(ids)


def _some(windows: Sequence[Tensor]) -> list[Tensor]:
    """As many rows as MAX_TOKENS allow, at least one."""
    rows = torch.cat([window[:, :-1] for window in windows])
    return [rows[: max(1, MAX_TOKENS // rows.shape[1])]]


def _text_ids(subject: Subject, plan: Plan) -> list[int]:
    if plan.text is not None:
        return subject.tokenizer.encode(plan.text)
    rows = torch.cat([window[:, :-1] for window in subject.windows])
    ids: list[int] = rows.flatten()[: max(rows.shape[1], SHORT)].long().tolist()
    return ids
