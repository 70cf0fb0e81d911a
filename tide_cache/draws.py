"""Randomness as a pure function: every draw is keyed by what it is for, never by when it happens.

A generator is a Philox counter keyed by blake2b(purpose, seed, sample id, view). So the masks of a
row do not depend on batch, shard, worker, order or on which other rows exist.
"""

import hashlib

import numpy as np


def generator(seed: int, sample_id: str, view: int, purpose: str) -> np.random.Generator:
    """Return the generator of one (seed, sample, view) for one purpose, such as `"mask"`.

    Purposes never share a stream. `view` is -1 for draws that concern the sample as a whole.
    """
    text = f"{purpose}\x1f{seed}\x1f{sample_id}\x1f{view}".encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
