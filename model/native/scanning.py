"""Looking through rows of logits with the native core: what `model.decoding` asks of them, without writing them out.

Tokens found are those that numpy finds, and so is every number but the logarithms of sums, whose order is the core's
own: the same on every instruction set, with any number of threads, and whatever rows stand beside a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.decoding.scan import Ahead, Drawing
from topkapi.model.native import library as interface
from topkapi.model.native.library import c_int, c_pointer, check

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

STRIP = 64
"""Tokens whose maximum is kept, as core.h has it."""

ROOM = 512
"""Tokens of a row that are found at once; where there are more, they are looked for again with enough room."""

FEW = 64
"""Rows whose scan is made with their logits; more are those of a text that is scored."""

_Scanned = interface._structure(
    "Scanned", kernels=c_pointer, threads=c_pointer, count=c_int, size=c_int, rows=c_pointer, divisors=c_pointer,
    maxima=c_pointer,
)  # fmt: skip
_Drawing = interface._structure(
    "Drawing", divisors=c_pointer, cuts=c_pointer, values=c_pointer, places=c_pointer, threshold=ctypes.c_uint64,
)  # fmt: skip
_Ahead = interface._structure(
    "Ahead", most=c_int, ends=c_int, seconds=ctypes.c_double, interrupted=c_pointer, end=c_pointer,
)  # fmt: skip


@cache
def _library() -> ctypes.CDLL:
    core = interface.library()
    assert core is not None, "asked for where there is a core"
    core.topkapi_kernels.restype = c_pointer
    core.topkapi_scan.argtypes = [c_pointer] * 3
    core.topkapi_step.argtypes = [c_pointer] * 8
    core.topkapi_scan_totals.argtypes = [c_pointer] * 4
    core.topkapi_scan_collect.argtypes = [c_pointer] * 3 + [ctypes.c_uint64, c_int] + [c_pointer] * 3
    core.topkapi_scan_draw.argtypes = [c_pointer] * 5
    core.topkapi_steps.argtypes = [c_pointer] * 12
    core.topkapi_scan_largest.argtypes = core.topkapi_scan_above.argtypes = [c_pointer] * 3
    return core


class Scanner:
    """Scans rows of logits by the instructions of `level` on so many threads."""

    def __init__(self, level: str | None = None, threads: int | None = None) -> None:
        levels = interface.levels()
        self.kernels = _library().topkapi_kernels(levels.index(level or levels[-1]))
        self.threads = interface.shared_threads(threads or torch.get_num_threads())
        self._ready: Scan | None = None

    def __call__(self, rows: Sequence[Tensor]) -> Scan:
        """Scan logits, float32 `[V]` on the CPU each; they must not change as long as the scan is used."""
        size, ready = rows[0].shape[0], self._ready
        addresses = np.array([row.data_ptr() for row in rows], dtype=np.uint64)
        if ready is not None and (places := ready.places(addresses, size)) is not None:
            return ready.some(places)
        assert all(row.shape == (size,) and row.dtype == torch.float32 and row.is_contiguous() for row in rows)
        scan = self._blank(rows, addresses)
        check(_library().topkapi_scan(scan.structure, scan.best.ctypes.data, scan.first.ctypes.data))
        return scan

    def step(
        self, network: ctypes.c_void_p, slots: ctypes.c_void_p, work: int, wanted: Sequence[int], vocabulary: int
    ) -> Tensor:
        """A pass of a network, `work` being the address of its structure, and the logits `[R, V]` of the `wanted` rows,
        whose scan is ready when it is asked for."""
        logits = torch.empty(len(wanted), vocabulary)
        rows, few = np.array(wanted, dtype=np.int32), 0 < len(wanted) <= FEW
        addresses = logits.data_ptr() + np.arange(len(wanted), dtype=np.uint64) * np.uint64(4 * vocabulary)
        scan = self._blank(logits.unbind() or [logits.new_empty(vocabulary)], addresses)
        check(
            _library().topkapi_step(
                network, slots, work, rows.ctypes.data, logits.data_ptr(), scan.structure,
                scan.best.ctypes.data if few else None, scan.first.ctypes.data,
            )
        )  # fmt: skip
        self._ready = scan if few else None
        return logits

    def steps(
        self,
        network: ctypes.c_void_p,
        slots: ctypes.c_void_p,
        work: int,
        drawing: Drawing,
        ahead: Ahead,
        vocabulary: int,
    ) -> list[tuple[float, list[int]]]:
        """Passes of a network whose rows read a token each, what is drawn in one being read in the next: after how many
        seconds each was done, and a token of each row, as far as `ahead` goes and every row has something to choose."""
        rows, done = len(drawing.places), ctypes.c_int()
        logits = torch.empty(rows, vocabulary)
        addresses = logits.data_ptr() + np.arange(rows, dtype=np.uint64) * np.uint64(4 * vocabulary)
        scan, ends = self._blank(logits.unbind(), addresses), np.array(ahead.ends, dtype=np.int32)
        tokens, seconds = np.empty((ahead.most, rows), dtype=np.int32), np.empty(ahead.most, dtype=np.float64)
        how, interrupted = _drawing(drawing), ahead.interrupted.ctypes.data
        far = _Ahead(ahead.most, len(ahead.ends), ahead.seconds, interrupted, ends.ctypes.data)
        self._ready = None
        check(
            _library().topkapi_steps(
                network, slots, work, logits.data_ptr(), scan.structure, scan.best.ctypes.data, scan.first.ctypes.data,
                ctypes.addressof(how), ctypes.addressof(far), tokens.ctypes.data, seconds.ctypes.data,
                ctypes.addressof(done),
            )
        )  # fmt: skip
        return list(zip(seconds[: done.value].tolist(), tokens[: done.value].tolist(), strict=True))

    def _blank(self, rows: Sequence[Tensor], addresses: NDArray[np.uint64]) -> Scan:
        count, size = len(addresses), len(rows[0])
        maxima = np.empty((count, -(-size // STRIP)), dtype=np.float32)
        best, first = np.empty(count, dtype=np.float32), np.empty(count, dtype=np.int32)
        return Scan(self, rows, addresses, maxima, best, first, np.ones(count, dtype=np.float32))


class Scan:
    """B rows of logits where they lie in memory, each divided by its `divisor`.

    `best [B]` float32 is the largest of each row, NaN where there is one, and `first [B]` the first token that has it.
    """

    def __init__(
        self, scanner: Scanner, rows: Sequence[Tensor], addresses: NDArray[np.uint64], maxima: Floats, best: Floats,
        first: NDArray[np.int32], divisors: Floats, divided: bool = False,
    ) -> None:  # fmt: skip
        self.rows, self.best, self.first, self.divided = rows, best, first, divided
        self._scanner, self._addresses, self._maxima, self._divisors = scanner, addresses, maxima, divisors
        self._structure = _Scanned(
            scanner.kernels, scanner.threads, len(addresses), len(rows[0]), addresses.ctypes.data, divisors.ctypes.data,
            maxima.ctypes.data,
        )  # fmt: skip
        self.structure = ctypes.addressof(self._structure)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """The vocabulary's."""
        return len(self.rows[0])

    def places(self, addresses: NDArray[np.uint64], size: int) -> list[int] | None:
        """Which of the rows lie at `addresses`; None if one of them is none of these rows."""
        if size != self.size:
            return None
        found = np.minimum(np.searchsorted(self._addresses, addresses), len(self._addresses) - 1)
        places: list[int] = found.tolist()
        return places if (self._addresses[found] == addresses).all() else None

    def some(self, indexes: list[int]) -> Scan:
        """Some of the rows."""
        if indexes == list(range(len(self.rows))):
            return self
        return Scan(
            self._scanner, [self.rows[index] for index in indexes], self._addresses[indexes], self._maxima[indexes],
            self.best[indexes], self.first[indexes], self._divisors[indexes], self.divided,
        )  # fmt: skip

    def again(self, logits: Tensor) -> Scan:
        """A scan of other logits, `[B, V]` float32 on the CPU."""
        return self._scanner(logits.contiguous().unbind())

    def divide(self, divisors: Floats) -> Scan | None:
        """The rows divided by `divisors [B]`; None where they are divided already."""
        if self.divided:
            return None
        return Scan(
            self._scanner, self.rows, self._addresses, self._maxima, self.best / divisors, self.first,
            np.ascontiguousarray(divisors), True,
        )  # fmt: skip

    def written(self) -> Floats:
        """All logits, `[B, V]`."""
        whole = np.stack([row.numpy() for row in self.rows])
        return np.divide(whole, self._divisors[:, None], out=whole) if self.divided else whole

    def totals(self) -> tuple[Doubles, Doubles]:
        """The sums of exp(logit - best) over each row, `[B]`, and of that times (best - logit)."""
        sums, weighted = np.empty(len(self), dtype=np.float64), np.empty(len(self), dtype=np.float64)
        best = self.best.ctypes.data
        check(_library().topkapi_scan_totals(self.structure, best, sums.ctypes.data, weighted.ctypes.data))
        return sums, weighted

    def get(self, rows: Ids, token_ids: Ids) -> Floats:
        """The logits of these tokens of these rows, `[n]` each."""
        found = [self.rows[row].numpy()[token_id] for row, token_id in zip(rows.tolist(), token_ids, strict=True)]
        result: Floats = np.array(found, dtype=np.float32) / self._divisors[rows]
        return result

    def at_least(self, floors: Floats) -> tuple[Floats, Ids]:
        """The tokens of at least `floors [B]`: logits and ids `[B, K]`, ascending; behind the last -inf and V."""
        return self._collect(floors, None, 0)

    def outstanding(self, floors: Floats, keys: Ids, threshold: int) -> tuple[Floats, Ids]:
        """The tokens of at least `floors [B]`, and those whose hash with their row's key (see
        `model.decoding.noise.loud_tokens`) is at least `threshold`."""
        return self._collect(floors, np.ascontiguousarray(keys), threshold)

    def largest(self, k: NDArray[np.int64]) -> tuple[Floats, Ids]:
        """The `k [B]` largest of each row, and those equal to the last of them."""
        found, count = np.empty(len(self), dtype=np.float32), np.ascontiguousarray(k, dtype=np.int32)
        check(_library().topkapi_scan_largest(self.structure, count.ctypes.data, found.ctypes.data))
        return self.at_least(found / self._divisors)

    def drawn(self, drawing: Drawing) -> list[int]:
        """A token of each row, undivided so far; -1 where the largest logit is infinite or none."""
        assert not self.divided
        tokens, structure = np.empty(len(self), dtype=np.int32), _drawing(drawing)
        check(
            _library().topkapi_scan_draw(
                self.structure, self.best.ctypes.data, self.first.ctypes.data, ctypes.addressof(structure),
                tokens.ctypes.data,
            )
        )  # fmt: skip
        result: list[int] = tokens.tolist()
        return result

    def above(self, values: Floats) -> list[int]:
        """How many undivided logits of each row are more than `values [B]`."""
        counts, values = np.empty(len(self), dtype=np.int32), np.ascontiguousarray(values)
        check(_library().topkapi_scan_above(self.structure, values.ctypes.data, counts.ctypes.data))
        result: list[int] = counts.tolist()
        return result

    def _collect(self, floors: Floats, keys: Ids | None, threshold: int) -> tuple[Floats, Ids]:
        room = min(ROOM, self.size)
        floors, counts = np.ascontiguousarray(floors, dtype=np.float32), np.empty(len(self), dtype=np.int32)
        while True:
            ids, values = np.empty((len(self), room), dtype=np.int64), np.empty((len(self), room), dtype=np.float32)
            check(
                _library().topkapi_scan_collect(
                    self.structure, floors.ctypes.data, None if keys is None else keys.ctypes.data, threshold, room,
                    counts.ctypes.data, ids.ctypes.data, values.ctypes.data,
                )
            )  # fmt: skip
            most = int(counts.max())
            if most <= room:
                width = max(1, most)
                return np.ascontiguousarray(values[:, :width]), np.ascontiguousarray(ids[:, :width])
            room = most


def _drawing(drawing: Drawing) -> ctypes.Structure:
    """As the core is told of it; the arrays must live as long."""
    arrays = (drawing.divisors, drawing.cuts, drawing.values, drawing.places)
    return _Drawing(*(array.ctypes.data for array in arrays), drawing.threshold)
