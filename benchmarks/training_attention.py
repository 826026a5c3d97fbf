"""What attention costs in a training step here, forwards and backwards: over whole windows beside PyTorch's fused one,
over texts of different lengths beside the same tiles for one text after another.

    python benchmarks/training_attention.py [--repeats 12]

The shapes are those of small networks with grouped heads at 512 and 1,024 tokens, and of a 124M one. They take turns,
and what is printed is the fastest of the repeats of each, in milliseconds, and their ratio.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from topkapi.model.attention import causal_attention
from topkapi.model.transformer import Attend
from topkapi.training.optimisation.attention import packed_attention, tiled_attention

# Texts, heads, key-value heads, tokens; heads are 64 wide.
SHAPES = ((4, 4, 1, 512), (4, 4, 2, 1024), (2, 12, 12, 1024))
HEAD = 64
# The shortest and the longest of 32 texts side by side.
LENGTHS = ((20, 90), (20, 300))


def seconds(attend: Attend, inputs: list[torch.Tensor], upstream: torch.Tensor) -> float:
    """One pass forwards and backwards."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    began = time.perf_counter()
    attend(0, *leaves).backward(upstream)  # type: ignore[no-untyped-call]
    return time.perf_counter() - began


def one_by_one(lengths: tuple[int, ...], layer: int, *heads: torch.Tensor) -> torch.Tensor:
    """Attention within each of the texts, by itself."""
    texts = zip(*(each.split(lengths, dim=2) for each in heads), strict=True)
    return torch.cat([tiled_attention(layer, *text) for text in texts], dim=2)


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=12)
    repeats = parser.parse_args().repeats
    for texts, heads, groups, length in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            # As a network has them: the heads of a token lie together.
            q, k, v = (
                torch.randn(texts, length, each, HEAD).to(dtype).transpose(1, 2) for each in (heads, groups, groups)
            )
            upstream = torch.randn(texts, heads, length, HEAD).to(dtype)
            pairs = [
                [seconds(attend, [q, k, v], upstream) for attend in (causal_attention, tiled_attention)]
                for _ in range(repeats)
            ]
            theirs, ours = (min(each) * 1e3 for each in zip(*pairs, strict=True))
            print(
                f"{texts} x {length} tokens, {heads} heads, {groups} key-value heads, {str(dtype)[6:]}: "
                f"PyTorch {theirs:.1f} ms, tiles {ours:.1f} ms, {theirs / ours:.2f} times as fast",
                flush=True,
            )
    for shortest, longest in LENGTHS:
        generator = torch.Generator().manual_seed(0)
        lengths = tuple(torch.randint(shortest, longest + 1, (32,), generator=generator).tolist())
        inputs = [torch.randn(1, each, sum(lengths), HEAD, dtype=torch.bfloat16) for each in (4, 2, 2)]
        ways: list[Any] = [partial(one_by_one, lengths), partial(packed_attention, lengths=torch.tensor(lengths))]
        pairs = [[seconds(way, inputs, torch.ones_like(inputs[0])) for way in ways] for _ in range(repeats)]
        alone, packed = (min(each) * 1e3 for each in zip(*pairs, strict=True))
        print(
            f"32 texts of {shortest} to {longest} tokens, 4 heads, 2 key-value heads, bfloat16: one by one {alone:.1f} "
            f"ms, of like length together {packed:.1f} ms, {alone / packed:.2f} times as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
