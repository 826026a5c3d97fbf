"""Windows over a token stream, in an order that is a pure function of the seed and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.errors import DataError

IGNORED = -100

Tokens = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Batch:
    """`tokens` and `targets [B, T]` int64; a target of `IGNORED` is not trained.

    `weights [B, T]` float32 scales each target's loss (None: all 1). With `texts`, texts of any lengths stand one after
    another in a single row (B = 1) without padding, and none may see another: the lengths of the texts of each window
    or example, which stay together.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor | None = None
    texts: tuple[tuple[int, ...], ...] | None = None

    @property
    def size(self) -> int:
        """Windows or examples in the batch."""
        return len(self.tokens) if self.texts is None else len(self.texts)

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """The lengths of all texts, in order."""
        return None if self.texts is None else tuple(length for part in self.texts for length in part)

    def split(self, size: int) -> Iterator[Batch]:
        """The batch in parts of at most `size` windows or examples."""
        end = 0
        for start in range(0, self.size, size):
            if self.texts is None:
                yield self._part((slice(start, start + size),), None)
            else:
                texts = self.texts[start : start + size]
                begin, end = end, end + sum(map(sum, texts))
                yield self._part((slice(None), slice(begin, end)), texts)

    def _part(self, at: tuple[slice, ...], texts: tuple[tuple[int, ...], ...] | None) -> Batch:
        return Batch(self.tokens[at], self.targets[at], None if self.weights is None else self.weights[at], texts)

    def weight(self) -> float:
        """The sum of the weights of all trained targets: what the loss is divided by."""
        trained = self.targets != IGNORED
        return float(trained.sum()) if self.weights is None else float((self.weights * trained).sum())

    def token_count(self) -> int:
        """Trained targets in the batch."""
        return int((self.targets != IGNORED).sum())


class Loader(Protocol):
    """Batches by number. Nothing is remembered between calls, so a run resumes at any step exactly."""

    @property
    def steps_per_epoch(self) -> int: ...

    @property
    def stream(self) -> NDArray[np.unsignedinteger[Any]]:
        """All its tokens one after another, to search in."""
        ...

    def batch(self, step: int) -> Batch:
        """The batch of update `step` (0-based, counted over all epochs)."""
        ...

    def origins(self, step: int) -> list[str]:
        """Where each row of that batch comes from, for messages."""
        ...

    def first(self, batches: int | None) -> list[Batch]:
        """A fixed choice of batches to evaluate on (None: all, in order, the last one possibly smaller)."""
        ...


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of `size` items in `epoch`: a pure function of its arguments."""
    key = np.array([seed & (2**64 - 1), epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(size)


# The order in which evaluation batches are chosen: an epoch that training never reaches.
EVALUATION_EPOCH = 2**63


# `(epoch, numbers of windows or examples of each part) -> their order in that epoch`, a pure function.
Order = Callable[[int, Sequence[int]], NDArray[np.int64]]


class WindowLoader:
    """Windows of `context` tokens that start every `stride` tokens of `stream`, shuffled anew in every epoch.

    Each window's targets are its tokens moved by one. What does not fill a batch at the end of an epoch is left out.
    `documents` says where each document of the stream begins. The stream may consist of `parts` of so many tokens, over
    whose borders no window reaches, and `order` may replace the order of an epoch.
    With `separator`, the token that ends a document, no document of a window sees another: a document is read from the
    end of the one before, so that its first token, too, is predicted from nothing but that.
    Raises `DataError` naming `sources` when the stream does not fill one batch, or one window for `validation`.
    """

    def __init__(
        self,
        stream: NDArray[np.unsignedinteger[Any]],
        *,
        context: int,
        stride: int,
        batch_size: int,
        seed: int,
        sources: str = "the data",
        validation: bool = False,
        separator: int | None = None,
        documents: NDArray[np.int64] | None = None,
        order: Order | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        self.separator = separator
        self.documents = np.zeros(1, np.int64) if documents is None else documents
        self.stream, self.context, self.stride, self.batch_size, self.seed = stream, context, stride, batch_size, seed
        lengths = np.array([len(stream)] if parts is None else parts)
        counts = np.maximum(0, -(-(lengths - context) // stride))
        self.windows = int(counts.sum())
        # Where each part's tokens and windows begin.
        self._begins, self._firsts = np.cumsum(lengths) - lengths, np.cumsum(counts) - counts
        self._chosen = order
        self.parts: list[int] = counts.tolist()
        rows = 1 if validation else batch_size
        if self.windows < rows:
            kind, remedy = ("validation", "raise --validation-fraction") if validation else ("training", "--batch-size")
            raise DataError(
                f"too little {kind} text in {sources}: {len(stream):,} tokens, and "
                f"{rows} window{'s' * (rows > 1)} of {context} need {context + 1 + stride * (rows - 1):,}",
                field="data",
                hint=f"give more text, or lower --context-length or {remedy}"
                if not validation
                else f"give more text, lower --context-length, or {remedy}",
            )
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.windows // self.batch_size

    def batch(self, step: int) -> Batch:
        return self._gather(self._rows(step))

    def origins(self, step: int) -> list[str]:
        names = []
        for start in self._starts(self._rows(step)):
            first, last = np.searchsorted(self.documents, [start, start + self.context], side="right").tolist()
            documents = f"document {first}" if first == last else f"documents {first} to {last}"
            names.append(f"{documents} of the training text, tokens {start:,} to {start + self.context:,}")
        return names

    def _rows(self, step: int) -> NDArray[np.int64]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = (
                permutation(self.seed, epoch, self.windows) if self._chosen is None else self._chosen(epoch, self.parts)
            )
            self._order = (epoch, order)
        return self._order[1][index * self.batch_size : (index + 1) * self.batch_size]

    def _starts(self, windows: NDArray[np.int64]) -> list[int]:
        """The first token of each of these windows."""
        part = np.searchsorted(self._firsts, windows, side="right") - 1
        starts: list[int] = (self._begins[part] + (windows - self._firsts[part]) * self.stride).tolist()
        return starts

    def first(self, batches: int | None) -> list[Batch]:
        order = np.arange(self.windows)
        if batches is not None and batches * self.batch_size < self.windows:
            order = permutation(self.seed, EVALUATION_EPOCH, self.windows)[: batches * self.batch_size]
        return [self._gather(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)]

    def _gather(self, windows: NDArray[np.int64]) -> Batch:
        rows = np.stack([self.stream[at : at + self.context + 1] for at in self._starts(windows)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.separator is None:
            return Batch(inputs, targets)
        texts = tuple(self._lengths(row) for row in rows[:, :-1])
        return Batch(inputs.reshape(1, -1), targets.reshape(1, -1), texts=texts)

    def _lengths(self, window: NDArray[np.unsignedinteger[Any]]) -> tuple[int, ...]:
        """The lengths of a window's documents."""
        starts = np.flatnonzero(window[1:] == self.separator) + 1
        return tuple(np.diff(starts, prepend=0, append=len(window)).tolist())


def joined(texts: Iterable[Sequence[int]]) -> Tokens:
    """Texts one after another, with something between that is no token, so that no passage runs on."""
    ids = chain.from_iterable((*text, 2**32 - 1) for text in texts)
    return np.fromiter(ids, dtype=np.uint32)
