"""Noise as a function: the same seed, sequence, position and token always give the same number.

So a sample depends on nothing else the server does: not on batch neighbours, order, restarts or speculation.
Adding Gumbel noise to log-probabilities and taking the largest draws from their distribution (Gumbel 1954; Maddison
et al. 2014). The mixing function is SplitMix64's finaliser (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64's constants as signed 64-bit integers: torch multiplies modulo 2^64, which is what the hash needs.
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
SECOND = 0x94D049BB133111EB - (1 << 64)


def gumbel(seeds: Tensor, sequences: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64.

    `seeds`, `sequences` and `positions` are int64 `[B]`, `token_ids` int64 `[B, K]` or `[K]`; returns `[B, K]`.
    """
    row = _mix(_mix(_mix(seeds * GOLDEN) + sequences * GOLDEN) + positions * GOLDEN)
    bits = _mix(row.unsqueeze(-1) + token_ids * GOLDEN)
    # 53 random bits and a half: strictly between 0 and 1, so both logarithms are finite.
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * FIRST
    x = (x ^ _shift_right(x, 27)) * SECOND
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
