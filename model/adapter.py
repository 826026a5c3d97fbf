"""Adapters: a few trained numbers beside frozen matrices.

LoRA (Hu et al. 2021) adds a product of two thin matrices to a frozen one; DoRA (Liu et al. 2024) then sets the length
of each of the sum's rows. Rows of the embedding that stand for new tokens train whole. How adapters are stored:
`model.storage.adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from topkapi.model.linear import Linear
from topkapi.model.transformer import Decoder, TrainedRows

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer, by their names in `Decoder`; the gpt2 family has no `gate_proj`."""

SMALLEST_SQUARE = 1e-30


class Adapter(nn.Module):
    """What is added to one `Linear`: `scale * up(down(dropout(x)))`, `down` to `rank` numbers and `up` from them.

    `up` starts at zero and `down` uniform in +-1/sqrt(inputs), drawn from `generator`, so that at first nothing
    changes. With `decomposed` (DoRA) the rows of the sum have the trained lengths `magnitude [outputs]`; their present
    lengths count as constants in the backward pass (section 4.3 of the paper). That needs the matrix as it is, not held
    in another form.
    """

    def __init__(
        self,
        linear: Linear,
        *,
        rank: int,
        scale: float,
        dropout: float,
        decomposed: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        outputs, inputs = linear.weight.shape
        self.scale, self.dropout = scale, dropout
        self.down, self.up = Linear(inputs, rank), Linear(rank, outputs)
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            self.down.weight.uniform_(-bound, bound, generator=generator)
            self.up.weight.zero_()
        self.squares: Tensor
        self.magnitude: nn.Parameter | None = None
        if decomposed:
            self.register_buffer("squares", linear.weight.detach().float().square().sum(1), persistent=False)
            self.magnitude = nn.Parameter(self.squares.sqrt())

    def forward(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        """`x [..., inputs]` and what `linear` made of it, `y [..., outputs]` -> `[..., outputs]` as `y` is."""
        if self.training and self.dropout:
            x = functional.dropout(x, self.dropout)
        update: Tensor = self.up(self.down(x) * self.scale)
        if self.magnitude is None:
            return y + update.to(y.dtype)
        # In float32, for the factor hardly differs from 1.
        factor = self.magnitude / self._lengths(linear)
        total = y.float() + update.float()
        if linear.bias is None:
            return (total * factor).to(y.dtype)
        bias = linear.bias.float()
        return ((total - bias) * factor + bias).to(y.dtype)

    @torch.no_grad()
    def _lengths(self, linear: Linear) -> Tensor:
        """Lengths of the sum's rows `[outputs]`: |w + sba|^2 = |w|^2 + 2s(wa')b' + s^2(baa')b', thin products only."""
        down, up = self.down.weight, self.up.weight
        crossed = functional.linear(linear.weight, down.to(linear.weight.dtype)).float()
        gram = functional.linear(down, down)
        sums = 2 * self.scale * (crossed * up).sum(1) + self.scale**2 * ((up @ gram) * up).sum(1)
        # A row of zeros, by rounding a little below, has some length: its magnitude, zero too, is divided by it.
        return (self.squares + sums).clamp_min(SMALLEST_SQUARE).sqrt()


def attach(
    model: Decoder, targets: Iterable[str], make: Callable[[Linear], Adapter], token_ids: Sequence[int] = ()
) -> None:
    """Freeze `model` and give adapters to the matrices named in `targets`, trained rows to `token_ids`."""
    model.requires_grad_(False)
    for _, linear in list(named_linears(model, targets)):
        linear.adapter = make(linear)
    if token_ids:
        output = None if model.config.tie_embeddings else model.lm_head.weight
        model.trained_rows = TrainedRows(token_ids, model.embed_tokens.weight, output)


def named_linears(model: Decoder, targets: Iterable[str] = TARGETS) -> Iterator[tuple[str, Linear]]:
    """The matrices of the layers that are named in `targets`, with their full names."""
    wanted = frozenset(targets)
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear) and name.rpartition(".")[2] in wanted:
            yield name, module
