"""The small parts of a network: norms, nonlinearities, and rows of the embedding that train alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from topkapi.model.config import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu_squared": lambda x: functional.relu(x).square(),
}
"""The nonlinearities of feed-forward layers, by `ModelConfig`'s names."""


class Norm(nn.Module):
    """LayerNorm with a bias or RMSNorm, computed in float32: `[..., size] -> [..., size]` float32.

    `offset` is added to the weight: what is stored is then how far from it the weight is. Without `weighted` there is
    no weight.
    """

    def __init__(
        self, size: int, eps: float, *, layer_norm: bool = False, offset: float = 0.0, weighted: bool = True
    ) -> None:
        super().__init__()
        self.size, self.offset = size, offset
        self.weight = nn.Parameter(torch.empty(size)) if weighted else None
        self.bias = nn.Parameter(torch.empty(size)) if layer_norm else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.weight is None:
            return functional.rms_norm(x, (self.size,), None, self.eps)
        weight = self.weight.float()
        if self.offset:
            weight = weight + self.offset
        if self.bias is not None:
            return functional.layer_norm(x, weight.shape, weight, self.bias.float(), self.eps)
        return functional.rms_norm(x, weight.shape, weight, self.eps)


def norm_of(config: ModelConfig, size: int, *, layer_norm: bool = False) -> Norm:
    """A norm of the family's kind over `size` numbers."""
    traits = config.traits
    return Norm(
        size, config.norm_eps, layer_norm=layer_norm, offset=traits.norm_offset, weighted=not traits.weightless_norms
    )


class TrainedRows(nn.Module):
    """Rows of the embedding that train while its table stays frozen: those of `token_ids`, ascending.

    Where the output matrix is the same one (tied), its rows are these too; else it has trained rows of its own.
    """

    def __init__(self, token_ids: Sequence[int], table: Tensor, output: Tensor | None) -> None:
        super().__init__()
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)
        self.embedding = nn.Parameter(table.detach()[self.token_ids].float())
        self.output = None if output is None else nn.Parameter(output.detach()[self.token_ids].float())

    def embed(self, tokens: Tensor, x: Tensor) -> Tensor:
        """`x [B, T, hidden_size]`, the embedding of `tokens [B, T]`, with the trained rows in their places."""
        at = torch.searchsorted(self.token_ids, tokens).clamp_max(len(self.token_ids) - 1)
        found = (self.token_ids[at] == tokens).unsqueeze(-1)
        return torch.where(found, self.embedding[at], x)

    def score(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """`logits [..., vocab_size]` of `hidden [..., hidden_size]` with those of the trained rows in their places."""
        rows = self.embedding if self.output is None else self.output
        return logits.index_copy(-1, self.token_ids, functional.linear(hidden, rows.to(hidden.dtype)).to(logits.dtype))
