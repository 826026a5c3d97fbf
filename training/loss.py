"""Cross-entropy of next tokens, computed in chunks so that float32 logits never exist for a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from model.transformer import Attend, Decoder, causal_attention
from training.data.windows import IGNORED, Batch

# Logits held at once, in numbers: 64 MB of float32. More gains nothing, and less keeps them nearer to the caches.
LOGITS_AT_ONCE = 1 << 24

Hidden = Callable[[Tensor, Tensor, Attend], Tensor]


def backward(
    model: Decoder, batch: Batch, *, divisor: float, micro_batch_size: int | None = None, hidden: Hidden | None = None
) -> float:
    """Add the gradients of the batch's loss to the parameters and return the loss.

    The loss is the weighted sum over trained targets in nats divided by `divisor`, so that the result does not
    depend on `micro_batch_size`, the rows computed at once. The output layer is differentiated chunk by chunk right
    after its forward pass; the network below gets the collected gradient in one pass. `hidden` replaces
    `model.hidden`, for a compiled one.
    """
    dropout = model.config.dropout if model.training else 0.0
    attend = partial(causal_attention, dropout=dropout) if dropout else causal_attention
    total = 0.0
    for part in batch.split(micro_batch_size or len(batch.tokens)):
        state = (hidden or model.hidden)(*_inputs(model, part), attend)
        flat = state.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        for rows, targets, weights in _chunks(model, part):
            leaf = flat[rows].requires_grad_()
            loss = _loss(model, leaf, targets, weights) / divisor
            torch.autograd.backward(loss)
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
        for part in batch.split(micro_batch_size or len(batch.tokens)):
            flat = model.hidden(*_inputs(model, part), causal_attention).flatten(0, 1)
            for rows, targets, weights in _chunks(model, part):
                total += _loss(model, flat[rows], targets, weights).item()
    model.train(training)
    return total / weight


def _inputs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    tokens = batch.tokens.to(model.device)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _chunks(model: Decoder, batch: Batch) -> list[tuple[Tensor | slice, Tensor, Tensor | None]]:
    """Row numbers, targets and weights of the trained positions, a chunk at a time."""
    targets = batch.targets.flatten()
    weights = None if batch.weights is None else batch.weights.flatten()
    trained = targets != IGNORED
    if weights is not None:
        trained &= weights > 0
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    every = bool(trained.all())
    rows = torch.arange(len(targets)) if every else trained.nonzero().squeeze(1)
    chunks: list[tuple[Tensor | slice, Tensor, Tensor | None]] = []
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        chunks.append(
            (
                slice(start, start + len(chosen)) if every else chosen.to(model.device),
                targets[chosen].to(model.device),
                None if weights is None else weights[chosen].to(model.device),
            )
        )
    return chunks


def _loss(model: Decoder, state: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    logits = model.logits(state)
    if weights is None:
        return functional.cross_entropy(logits, targets, reduction="sum")
    return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()
