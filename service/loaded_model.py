"""A loaded checkpoint, as whoever asks it has it in hand."""

from __future__ import annotations

from dataclasses import dataclass, field

from topkapi.engine.engine import Engine
from topkapi.model.serving import cache_bytes, kernels, weight_bytes
from topkapi.model.storage.card import Card
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.service.adapters import Use
from topkapi.service.metrics import ModelMetrics


class Hold:
    """Alive as long as somebody has the checkpoint in hand that it belongs to, alone or beside an adapter."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory, the engine that computes it, and its metrics; or these as an adapter's requests see them.

    Whoever has one in hand may use it: it is taken down only after that.
    """

    name: str
    checkpoint: Checkpoint
    engine: Engine
    metrics: ModelMetrics
    created: int
    control_ids: frozenset[int]
    why: str = ""
    """Why its matrices are held in what they are held in."""
    warnings: tuple[str, ...] = ()
    """What whoever loads it should know."""
    card: Card = field(default_factory=Card)
    """What it says of itself."""
    use: Use | None = None
    """The adapter that is asked for by this name, if it is an adapter's."""
    hold: Hold = field(default_factory=Hold, repr=False)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the checkpoint's, or fewer where memory is short."""
        return self.engine.config.context_length

    @property
    def dtype(self) -> str:
        """What the matrices are held in."""
        return self.checkpoint.model.held_in

    @property
    def cache_dtype(self) -> str:
        """What keys and values are held in."""
        return self.checkpoint.model.cache_dtype

    @property
    def memory(self) -> dict[str, int]:
        """About how many bytes its `weights` take, and its `cache` of keys and values once all of it is in use."""
        network = self.engine.network
        of_cache = network.slots * network.capacity * cache_bytes(self.checkpoint.model)
        return {"weights": weight_bytes(self.checkpoint.model), "cache": of_cache}

    @property
    def kernels(self) -> str:
        """What computes the network: the native core, on which instruction set, or PyTorch."""
        return kernels(self.checkpoint.model)

    def token_text(self, token_id: int) -> str:
        """The bytes of one token as text; a part of a character shows as U+FFFD."""
        return self.checkpoint.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def answer_bytes(self, token_id: int) -> bytes:
        """What a generated token adds to the answer's text: nothing for control tokens."""
        return b"" if token_id in self.control_ids else self.checkpoint.tokenizer.token_bytes(token_id)
