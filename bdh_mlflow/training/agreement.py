"""What all processes of a training must have in common, and what is refused where they do not. Of one process nothing is compared."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import bdh_mlflow
from bdh_mlflow import host
from bdh_mlflow.config import Config
from bdh_mlflow.distributed import World
from bdh_mlflow.errors import ConfigError, InputError
from bdh_mlflow.training.problems import problems


def refuse_for_several(config: Config, processes: int) -> None:
    """Raises ConfigError, with ways out, for what as many processes cannot train together.   config: resolved."""
    if processes > 1 and config.low_precision.use_fp8:
        raise ConfigError(
            f"low_precision.use_fp8: true cannot be combined with {processes} processes: its scales follow the passes of one process. "
            f"Train it with one process, or with compute_dtype: bfloat16"
        )
    if processes > 1 and config.training.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"training.device: {config.training.device} cannot be combined with {processes} processes, which have a GPU each or share the "
            f"CPU; set it to auto, cuda or cpu"
        )
    passes, batch_size = config.training.gradient_accumulation_steps, config.training.batch_size
    if passes % processes == 0:
        return
    fitting = math.lcm(passes, processes)
    if batch_size * passes % fitting == 0:
        way = f"training.batch_size {batch_size * passes // fitting}, training.gradient_accumulation_steps {fitting} keeps"
    else:
        way = f"training.gradient_accumulation_steps {fitting} with batch_size {batch_size} makes it larger than"
    possible = [str(n) for n in range(1, passes + 1) if passes % n == 0]
    raise ConfigError(
        f"training.gradient_accumulation_steps: {passes} {'passes' if passes > 1 else 'pass'} an update cannot be divided among "
        f"{processes} processes, each of which computes as many. {way} {config.tokens_per_step:,} tokens an update; "
        f"as it is, {' or '.join(possible)} process{'es' if len(possible) > 1 else ''} can train it"
    )


def refuse_differences(config: Config, world: World) -> None:
    """Raises an InputError on every rank where code or libraries differ, or where a rank's machine cannot do what is configured."""
    if world.size == 1:
        return
    unable = [str(problem) for problem in problems(config)]
    own = {f"version of {name}": version for name, version in host.versions().items() if name != "mlflow"}  # rank 0 alone imports it
    own["code of bdh_mlflow (digest)"] = code_digest()
    every = world.gather((own, unable))
    for rank, (_, reasons) in enumerate(every):
        if reasons:
            raise ConfigError("\n  ".join([f"{world.name(rank)} cannot train this configuration", *reasons]))
    refuse_different(world, [facts for facts, _ in every])


def refuse_different(world: World, facts: Sequence[Mapping[str, object]]) -> None:
    """Raises InputError with both values where a rank does not have the same as rank 0.   facts: of each rank, by what they are called."""
    first = facts[0]
    differences = [
        f"{what}: {first.get(what)} for {world.name(0)}, {others.get(what)} for {world.name(rank)}"
        for rank, others in enumerate(facts)
        for what in sorted(first.keys() | others.keys())
        if first.get(what) != others.get(what)
    ]
    if differences:
        raise InputError("\n  ".join(["the processes are not alike, and would not train the same", *differences]))


def code_digest() -> str:
    """Of the package's own sources, 12 hex digits."""
    folder, digest = Path(bdh_mlflow.__file__).parent, hashlib.sha256()
    for file in sorted((*folder.rglob("*.py"), *folder.rglob("*.cpp"))):
        digest.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]
