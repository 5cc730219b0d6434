"""The passes of an update: the random numbers that each may draw. Knows nothing of model, data or devices."""

import hashlib

import torch


def seed_pass(seed: int, step: int, number: int) -> None:
    """Seed torch's generators, of all devices, for one forward and backward pass.

    What a pass draws (dropout masks) is thereby a function of the training's seed, the updates completed before it and its number in the
    update. No generator has a state to save, to bring back after a failed update, or to hand to another process.
    """
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
