"""Cross-entropy of next tokens, computed in chunks so that float32 logits never exist for a whole batch.

Texts of different lengths are computed without padding: one after another in every matrix product, one by one in
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from model.transformer import Attend, Decoder, causal_attention
from training.data.windows import IGNORED, Batch

# Logits held at once, in numbers: 64 MB of float32. More gains nothing, and less keeps them nearer to the caches.
LOGITS_AT_ONCE = 1 << 24

Hidden = Callable[[Tensor, Tensor, Attend], Tensor]


class Objective(Protocol):
    """What a run makes smaller. `divisor` is the weight of the whole batch, of which `batch` may be a part."""

    def backward(
        self,
        model: Decoder,
        batch: Batch,
        *,
        divisor: float,
        micro_batch_size: int | None = None,
        hidden: Hidden | None = None,
        z_loss: float = 0.0,
    ) -> float:
        """Add the gradients of the batch's loss to the parameters and return the loss."""
        ...

    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """What is measured without training: `loss` and whatever else tells how the run goes."""
        ...


class NextToken:
    """The cross-entropy of trained targets."""

    def backward(self, model: Decoder, batch: Batch, *, divisor: float, **options: Any) -> float:
        """See `Objective`."""
        return backward(model, batch, divisor=divisor, **options)

    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """See `Objective`."""
        return {"loss": evaluate(model, batches, micro_batch_size)}


def backward(
    model: Decoder,
    batch: Batch,
    *,
    divisor: float,
    micro_batch_size: int | None = None,
    hidden: Hidden | None = None,
    z_loss: float = 0.0,
) -> float:
    """Add the gradients of the batch's loss to the parameters and return the loss.

    The loss is the weighted sum over trained targets in nats divided by `divisor`, so that the result does not
    depend on `micro_batch_size`, the windows or examples computed at once. The output layer is differentiated chunk by
    chunk right after its forward pass; the network below gets the collected gradient in one pass. `hidden` replaces
    `model.hidden`, for a compiled one. `z_loss` times the squared log of the softmax's denominator is added for every
    target, in the gradient only (Chowdhery et al. 2022, PaLM).
    """
    total = 0.0
    for part in batch.split(micro_batch_size or batch.size):
        state = (hidden or model.hidden)(*inputs(model, part))
        flat = state.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        for rows, targets, weights in chunks(model, part):
            leaf = flat[rows].requires_grad_()
            loss, penalty = _loss(model, leaf, targets, weights, z_loss)
            loss = loss / divisor
            torch.autograd.backward(loss if penalty is None else loss + penalty / divisor)
            assert leaf.grad is not None, "the loss depends on the state"
            gradient[rows] = leaf.grad
            total += loss.item()
        state.backward(gradient.view_as(state))  # type: ignore[no-untyped-call]
    return total


@torch.no_grad()
def evaluate(model: Decoder, batches: list[Batch], micro_batch_size: int | None = None) -> float:
    """Mean loss over all trained targets of `batches`, in nats; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    total = weight = 0.0
    for batch in batches:
        weight += batch.weight()
        for part in batch.split(micro_batch_size or batch.size):
            flat = model.hidden(*inputs(model, part)).flatten(0, 1)
            for rows, targets, weights in chunks(model, part):
                total += _loss(model, flat[rows], targets, weights)[0].item()
    model.train(training)
    return total / weight


def packed_attention(
    layer: int, q: Tensor, k: Tensor, v: Tensor, *, lengths: tuple[int, ...], dropout: float = 0.0
) -> Tensor:
    """Causal attention within each of the texts of these `lengths`, which stand one after another (B = 1)."""
    parts = (torch.split(each, list(lengths), dim=2) for each in (q, k, v))
    return torch.cat([causal_attention(layer, *text, dropout=dropout) for text in zip(*parts, strict=True)], dim=2)


def inputs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Attend]:
    """Tokens and positions `[B, T]`, where the network is, and the attention for them."""
    tokens, lengths = batch.tokens.to(model.device), batch.lengths
    dropout = model.config.dropout if model.training else 0.0
    if lengths is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return tokens, positions, partial(causal_attention, dropout=dropout) if dropout else causal_attention
    positions = torch.cat([torch.arange(length) for length in lengths]).to(tokens.device).unsqueeze(0)
    return tokens, positions, partial(packed_attention, lengths=lengths, dropout=dropout)


def chunks(model: Decoder, batch: Batch) -> list[tuple[Tensor | slice, Tensor, Tensor | None]]:
    """Row numbers, targets and weights of the trained positions, a chunk at a time."""
    targets = batch.targets.flatten()
    weights = None if batch.weights is None else batch.weights.flatten()
    trained = targets != IGNORED
    if weights is not None:
        trained &= weights > 0
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    every = bool(trained.all())
    rows = torch.arange(len(targets)) if every else trained.nonzero().squeeze(1)
    parts: list[tuple[Tensor | slice, Tensor, Tensor | None]] = []
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        parts.append(
            (
                slice(start, start + len(chosen)) if every else chosen.to(model.device),
                targets[chosen].to(model.device),
                None if weights is None else weights[chosen].to(model.device),
            )
        )
    return parts


def _loss(
    model: Decoder, state: Tensor, targets: Tensor, weights: Tensor | None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The loss of these states, summed, and with `z_loss` the penalty on the size of their logits."""
    logits = model.logits(state)
    penalty = None
    if z_loss:
        squares = logits.logsumexp(dim=-1).square()
        penalty = z_loss * (squares if weights is None else squares * weights).sum()
    if weights is None:
        return functional.cross_entropy(logits, targets, reduction="sum"), penalty
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum(), penalty
