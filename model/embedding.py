"""A text as one vector: the mean of the network's final states over its tokens, of length 1.

A language model is not trained for this, and an embedding model of its size does better; but the vectors of texts
about one thing are nearer to each other than to those of others, and no second network is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from topkapi.model.cache import PREFILL_CHUNK, SlotCache, Work, read
from topkapi.model.errors import ContextExceeded, EngineError
from topkapi.model.live_adapter import LiveAdapter
from topkapi.model.transformer import Decoder


def check_embeddable(token_ids: Sequence[int], context_length: int, field: str) -> None:
    """Raise `ContextExceeded` naming `field` for a text that does not fit the context."""
    if len(token_ids) > context_length:
        raise ContextExceeded(
            f"{field} has {len(token_ids)} tokens, and the context holds {context_length}",
            field=field,
            hint="cut the text into parts",
            tokens=len(token_ids),
            context_length=context_length,
        )


@torch.inference_mode()
def embed(
    model: Decoder,
    token_ids: Sequence[int],
    before_chunk: Callable[[], object] = lambda: None,
    adapter: LiveAdapter | None = None,
) -> list[float]:
    """The vector `[hidden_size]` of a text, the mean of its tokens' normalised last states scaled to length 1.

    The text is read in chunks of fixed size, as a prompt is, in a cache of its own: the same text gives the same bits
    whatever else the network is used for. `before_chunk` is called before each.
    Raises `EngineError` where the network gives no direction.
    """
    cache = SlotCache(model, capacity=len(token_ids))
    total = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    for start in range(0, len(token_ids), PREFILL_CHUNK):
        before_chunk()
        chunk = token_ids[start : start + PREFILL_CHUNK]
        states = read(model, cache, [Work(0, start, chunk, wanted=len(chunk), adapter=adapter)])
        total += states.double().sum(dim=0).cpu()
    length = float(total.norm())
    if not 0 < length < float("inf"):
        raise EngineError("the network's states have no mean direction", hint="the checkpoint is damaged")
    vector: list[float] = (total / length).float().tolist()
    return vector
