"""What an engine's cache slots hold, as a snapshot for whoever watches it from another thread."""

from __future__ import annotations

from dataclasses import dataclass

from topkapi.engine.engine import Engine
from topkapi.engine.request import Job
from topkapi.engine.sequences import Continuation, Sequence


@dataclass(frozen=True)
class SlotView:
    """A cache slot, and what is computed in it. A free slot has no `job`.

    Of the `prompt_tokens` and the `generated_tokens` after them, the first `computed_tokens` are in the cache;
    `sequence_index` tells the continuations of one job apart, and `started_at` is in `time.monotonic()` seconds.
    """

    slot: int
    job: Job | None = None
    sequence_index: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    generated_ids: tuple[int, ...] = ()
    started_at: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a sequence holds the slot."""
        return self.job is not None


def slot_views(engine: Engine) -> list[SlotView]:
    """Every slot in order. A sequence that the engine moves meanwhile shows where it was, or not at all."""
    views = [SlotView(slot) for slot in range(engine.network.slots)]
    for sequence in engine.sequences():
        slot = sequence.slot
        if slot is not None and not sequence.done:
            views[slot] = _view(slot, sequence)
    return views


def _view(slot: int, sequence: Sequence) -> SlotView:
    tokens = tuple(sequence.tokens)
    prompt = len(sequence.job.prompt) if isinstance(sequence, Continuation) else len(tokens)
    return SlotView(
        slot,
        sequence.owner.job,
        sequence.index,
        prompt_tokens=prompt,
        computed_tokens=min(sequence.computed, len(tokens)),
        generated_tokens=len(tokens) - prompt,
        generated_ids=tokens[prompt:],
        started_at=sequence.owner.started_at,
    )
