"""Noise as a function: the same seed, sequence, position and token always give the same number.

So a sample depends on nothing else the server does: not on batch neighbours, order, restarts or speculation.
Adding Gumbel noise to log-probabilities and taking the largest draws from their distribution (Gumbel 1954; Maddison
et al. 2014). The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.decoding.stage import Row

# SplitMix64's constants as signed 64-bit integers: torch multiplies modulo 2^64, which is what the hash needs.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)
UNSIGNED = (1 << 64) - 1
_GOLDEN = np.uint64(GOLDEN & UNSIGNED)


def row_keys(rows: Sequence[Row]) -> Tensor:
    """The hash of each row's seed, sequence and position, int64 `[B]`."""
    return torch.from_numpy(_key(row_places(rows)))


def row_places(rows: Sequence[Row]) -> NDArray[np.int64]:
    """Each row's seed, sequence and position, `[B, 3]`."""
    return np.array([(row.parameters.seed, row.sequence, row.position) for row in rows], dtype=np.int64)


def gumbel(seeds: Tensor, sequences: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64.

    `seeds`, `sequences` and `positions` are int64 `[B]`, `token_ids` int64 `[B, K]` or `[K]`; returns `[B, K]`.
    """
    keys = torch.from_numpy(_key(torch.stack((seeds, sequences, positions), dim=-1).cpu().numpy()))
    return gumbel_of_keys(keys.to(seeds.device), token_ids)


def gumbel_of_keys(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64 `[B, K]`, of `row_keys [B]` and token ids `[B, K]` or `[K]`."""
    return -torch.log(-torch.log(uniform_of_keys(keys, token_ids)))


def uniform_of_keys(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform noise, float64 `[B, K]`: 53 random bits and a half, strictly between 0 and 1.

    The clamp catches the one hash whose half is rounded up to 1.
    """
    if keys.device.type == "cpu":
        # Half the time of torch 2.13, which has no unsigned shift.
        mixed = _mixed(keys.unsqueeze(-1).numpy().view(np.uint64) + token_ids.numpy().view(np.uint64) * _GOLDEN)
        bits = torch.from_numpy((mixed >> np.uint64(11)).view(np.int64))
    else:
        bits = _shift_right(_mix(keys.unsqueeze(-1) + token_ids * GOLDEN), 11)
    return ((bits.double() + 0.5) * 2.0**-53).clamp(max=1 - 2.0**-53)


def loud_tokens(
    keys: Tensor, vocab_size: int, token_ids: Sequence[NDArray[np.int64]] | None, level: float
) -> list[NDArray[np.bool_]]:
    """For each of `row_keys [B]`, which tokens have Gumbel noise above `level` (at least 1).

    They are asked of the whole vocabulary, or of each row's own `token_ids`.

    It may name a few more, never fewer: only 31 bits are looked at. Logarithms of a whole vocabulary cost far more
    than its hashes.
    """
    threshold = np.uint64(loud_from(level))
    longest = vocab_size if token_ids is None else max(map(len, token_ids))
    whole, space = _token_products(vocab_size), np.empty((2, longest), dtype=np.uint64)
    found = []
    for row, key in enumerate(keys.tolist()):
        products = whole if token_ids is None else whole[token_ids[row]]
        x, shifted = space[:, : len(products)]
        np.add(products, np.uint64(key & UNSIGNED), out=x)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            np.right_shift(x, np.uint64(shift), out=shifted)
            np.bitwise_xor(x, shifted, out=x)
            np.multiply(x, np.uint64(factor & UNSIGNED), out=x)
        # The hash's last step leaves the upper 31 bits as they are.
        found.append(x >= threshold)
    return found


def loud_from(level: float) -> int:
    """The hash before its last step from which on noise may be above `level`."""
    return int(math.exp(-math.exp(-level)) * 2.0**31) - 1 << 33


@lru_cache(maxsize=8)
def _token_products(vocab_size: int) -> NDArray[np.uint64]:
    return np.arange(vocab_size, dtype=np.uint64) * _GOLDEN


def _key(places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The hashes `[B]` of seeds, sequences and positions `[B, 3]`."""
    seeds, sequences, positions = (places.view(np.uint64) * _GOLDEN).T
    return _mixed(_mixed(_mixed(seeds) + sequences) + positions).view(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` in numpy."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST & UNSIGNED)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND & UNSIGNED)
    return x ^ (x >> np.uint64(31))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * FIRST
    x = (x ^ _shift_right(x, 27)) * SECOND
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
