"""Cross-entropy of next tokens, computed in chunks so that float32 logits never exist for a whole batch.

Texts of different lengths are computed without padding, one after another in every matrix product; only in attention
are those of like length padded to the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from topkapi.model.transformer import Attend, Decoder
from topkapi.training.data.windows import IGNORED, Batch
from topkapi.training.optimisation.attention import packed_attention, training_attention

# Logits held at once, in numbers: 256 MB of float32. With a quarter of it the step of a 124M network takes a tenth
# longer, for every chunk goes over the whole output matrix and its gradient. Where that is narrow, going over it costs
# little beside going over the logits, and fewer rows stay in the caches: so many times the width of the state.
LOGITS_AT_ONCE = 1 << 26
ROWS_BY_WIDTH = 4


class Compiled(NamedTuple):
    """What of an update is compiled: `Decoder.hidden`, and what becomes of the scores."""

    hidden: Callable[[Tensor, Tensor, Attend], Tensor]
    normalised: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: Decoder) -> Compiled:
        """The compiled update of `model`; the compiler runs when it is first called."""
        return cls(torch.compile(model.hidden), torch.compile(_normalised))


class Objective(Protocol):
    """What a run makes smaller. `divisor` is the weight of the whole batch, of which `batch` may be a part."""

    def backward(
        self,
        model: Decoder,
        batch: Batch,
        *,
        divisor: float,
        micro_batch_size: int | None = None,
        compiled: Compiled | None = None,
        z_loss: float = 0.0,
    ) -> float:
        """Add the gradients of the batch's loss to the parameters and return the loss."""
        ...

    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """What is measured without training: `loss` and whatever else tells how the run goes; of no batches nothing."""
        ...


class NextToken:
    """The cross-entropy of trained targets."""

    def backward(self, model: Decoder, batch: Batch, *, divisor: float, **options: Any) -> float:
        """See `Objective`."""
        return backward(model, batch, divisor=divisor, **options)

    def evaluate(self, model: Decoder, batches: list[Batch], micro_batch_size: int | None) -> dict[str, float]:
        """See `Objective`."""
        return {"loss": evaluate(model, batches, micro_batch_size)} if batches else {}


def backward(
    model: Decoder,
    batch: Batch,
    *,
    divisor: float,
    micro_batch_size: int | None = None,
    compiled: Compiled | None = None,
    z_loss: float = 0.0,
) -> float:
    """Add the gradients of the batch's loss to the parameters and return the loss.

    The loss is the weighted sum over trained targets in nats divided by `divisor`, so that the result does not
    depend on `micro_batch_size`, the windows or examples computed at once. The output layer is differentiated chunk by
    chunk, from the gradient of the logits written down; the network below gets the collected gradient in one pass.
    `z_loss` times the squared log of the softmax's denominator is
    added for every target, in the gradient only (Chowdhery et al. 2022, PaLM).
    """
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    hidden, normalised = compiled or (model.hidden, _normalised)
    for part in batch.split(micro_batch_size or batch.size):
        state = hidden(*inputs(model, part))
        flat = state.detach().flatten(0, 1)
        gradient = torch.zeros_like(flat)
        for rows, targets, weights in chunks(model, part):
            leaf = flat[rows].requires_grad_()
            scores = model.scores(leaf)
            scale = (torch.ones_like(targets, dtype=torch.float32) if weights is None else weights) / divisor
            losses, slope = _differentiated(scores.detach(), targets, scale, z_loss, normalised)
            torch.autograd.backward(scores, slope)
            total += (losses * scale).sum()
            assert leaf.grad is not None, "the loss depends on the state"
            gradient[rows] = leaf.grad
        state.backward(gradient.view_as(state))  # type: ignore[no-untyped-call]
    # Asked for at the end, so that an accelerator is not waited for in between.
    return total.item()


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
                losses = functional.cross_entropy(model.logits(flat[rows]), targets, reduction="none")
                total += (losses if weights is None else losses * weights).sum().item()
    model.train(training)
    return total / weight


def inputs(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Attend]:
    """Tokens and positions `[B, T]`, where the network is, and the attention for them."""
    tokens, lengths = batch.tokens.to(model.device), batch.lengths
    dropout = model.config.dropout if model.training else 0.0
    if lengths is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return tokens, positions, partial(training_attention, dropout=dropout) if dropout else training_attention
    positions = torch.cat([torch.arange(length) for length in lengths]).to(tokens.device).unsqueeze(0)
    counts = torch.tensor(lengths)
    # The network is compiled once for texts of all lengths.
    for tensor, dimension in ((tokens, 1), (positions, 1), (counts, 0)):
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tokens, positions, partial(packed_attention, lengths=counts, dropout=dropout)


def chunks(model: Decoder, batch: Batch) -> list[tuple[Tensor | slice, Tensor, Tensor | None]]:
    """Row numbers, targets and weights of the trained positions, a chunk at a time."""
    targets = batch.targets.flatten()
    weights = None if batch.weights is None else batch.weights.flatten()
    trained = targets != IGNORED
    if weights is not None:
        trained &= weights > 0
    size = max(1, min(LOGITS_AT_ONCE // model.config.vocab_size, ROWS_BY_WIDTH * model.config.hidden_size))
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


def _differentiated(
    scores: Tensor,
    targets: Tensor,
    scale: Tensor,
    z_loss: float,
    normalised: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The losses `[R]` of `scores [R, V]`, and the gradient `[R, V]` of their sum weighted by `scale [R]`, with the
    penalty of `z_loss`.

    Autograd would go over the scores three times more.
    """
    targets = targets.unsqueeze(1)
    total, slope = normalised(scores, scale, z_loss)
    losses = total - scores.gather(1, targets).squeeze(1).float()
    # A probability minus one, exactly where the probability is nearly one.
    own = torch.expm1(-losses) + (2 * z_loss * total * torch.exp(-losses) if z_loss else 0.0)
    slope.scatter_(1, targets, (own * scale).unsqueeze(1).to(slope.dtype))
    return losses, slope


def _normalised(scores: Tensor, scale: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """The logs of the softmax's denominators `[R]` float32, and the probabilities, scaled, in the scores' precision."""
    logits = scores.float()
    slope = logits.softmax(dim=-1)
    # The likeliest token's probability is 1 / sum(exp(logits - largest)), and never small.
    total = logits.amax(dim=-1) - slope.amax(dim=-1).log()
    slope.mul_((scale * (1 + 2 * z_loss * total)).unsqueeze(1))
    return total, slope.to(scores.dtype)
