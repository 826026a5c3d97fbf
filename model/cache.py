"""Keys and values of many sequences, and reading new tokens of any of them in one pass of the network.

Every row of a pass gets the bits it would get in any other pass: alone or among others, as one token or within a
chunk of a prompt, after a prefix that was computed just now or long ago. Attention sums over keys in blocks of fixed
size and in order, per query; the matrix products see only row counts that were found to agree (`model.invariance`).

Slots rather than pages: the attention of a decode batch is then one batched product over a view of the cache. See
docs/LOG.md for the measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy
import torch
from torch import Tensor

from topkapi.model.attention import KEY_BLOCK, block_attention
from topkapi.model.config import ModelConfig
from topkapi.model.live_adapter import Groups, LiveAdapter, mixing
from topkapi.model.transformer import Core, Decoder

# Tokens of a prompt that are read at a time where no scheduler says otherwise.
PREFILL_CHUNK = 256
# Most rows that go through the output matrix at a time: with a large vocabulary they are most of the memory.
LOGIT_ROWS = 64
# Numbers of keys and values that are read in vain sooner than that sequences of different lengths attend apart: reading
# them takes as long as calling everything once more.
SPLIT_NUMBERS = 100_000


@dataclass(frozen=True)
class Work:
    """Read `token_ids` as positions `start, start + 1, ...` of the sequence in `slot`.

    The logits of the last `wanted` are asked for, and with `layers` also those of these earlier layers (0 is the
    embedding); of the last `states`, the final states. All is computed with `adapter`, where there is one.
    """

    slot: int
    start: int
    token_ids: Sequence[int]
    wanted: int = 1
    states: int = 0
    layers: Sequence[int] = ()
    adapter: LiveAdapter | None = None


@dataclass(frozen=True)
class NetworkOutput:
    """What a work asked for: `logits [wanted, V]`, `states [states, C]`, `early [J, wanted, V]` of J `layers`."""

    logits: Tensor
    states: Tensor
    early: Tensor


class Places:
    """Where new tokens belong: `positions [R]` of `slots [R]`, and in which block of keys that is."""

    def __init__(self, slots: Tensor, positions: Tensor) -> None:
        self.slots, self.positions = slots, positions
        self.blocks, self.offsets = positions // KEY_BLOCK, positions % KEY_BLOCK


class SlotCache:
    """Keys and values of up to `slots` sequences of up to `capacity` tokens (default: the context length), in
    `model.cache_dtype`, which is float32 where PyTorch computes.

    Keys lie in blocks, within a block one row per component, as products with few queries read them fastest (see
    docs/LOG.md). On a CPU, memory is taken only for what has been written.
    """

    def __init__(self, model: Decoder, slots: int = 1, capacity: int | None = None) -> None:
        config = model.config
        self.slots = slots
        self.capacity = capacity or config.context_length
        self.native = None if model.core is None else model.core.slots(slots, self.capacity, model.cache_dtype)
        if self.native is not None:
            return
        blocks = -(-self.capacity // KEY_BLOCK)
        before = (config.num_layers, slots, config.num_kv_heads)
        self._keys = _zeros((*before, blocks, config.head_dim, KEY_BLOCK), model.device)
        self._values = _zeros((*before, blocks * KEY_BLOCK, config.head_dim), model.device)

    @staticmethod
    def token_bytes(model: Decoder) -> int:
        """Memory that one token of one sequence takes."""
        if model.core is not None:
            return model.core.token_bytes(model.cache_dtype)
        config = model.config
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim * torch.float32.itemsize

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Give slot `target` the tokens from `start` to before `end` of slot `source`; before that they are alike."""
        if self.native is not None:
            self.native.copy(source, target, start, end)
            return
        self._values[:, target, :, start:end] = self._values[:, source, :, start:end]
        # Whole blocks: before `start` the slots are alike, and what lies behind `end` is masked until it is written.
        blocks = slice(start // KEY_BLOCK, -(-end // KEY_BLOCK))
        self._keys[:, target, :, blocks] = self._keys[:, source, :, blocks]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """A layer's keys `[slots, K, blocks, D, KEY_BLOCK]` and values `[slots, K, capacity, D]`."""
        return self._keys[index], self._values[index]

    def write(self, layer: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Put `k`, `v [R, K, D]` at `places`."""
        self._keys[layer][places.slots, :, places.blocks, :, places.offsets] = k
        self._values[layer][places.slots, :, places.positions] = v


@torch.inference_mode()
def read(model: Decoder, cache: SlotCache, works: Sequence[Work]) -> Tensor:
    """Run the network over all the new tokens of `works`, one work per slot at most.

    Returns the wanted final states, `[sum of wanted, hidden_size]` float32, in the order of `works`.
    """
    return _run(model, cache, works)[_wanted(works)]


@torch.inference_mode()
def outputs(model: Decoder, cache: SlotCache, works: Sequence[Work]) -> list[NetworkOutput]:
    """Run the network over all the new tokens of `works`, one work per slot at most; what each asked for."""
    order = sorted(range(len(works)), key=lambda at: _number(works[at]))
    if order != list(range(len(works))):
        # Rows of one adapter are multiplied together where they lie together.
        found = outputs(model, cache, [works[at] for at in order])
        return [output for _, output in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]
    layers: dict[int, Tensor] = {layer: torch.empty(0) for work in works for layer in work.layers}
    if model.core is None:
        hidden = _run(model, cache, works, layers)
        rows = wanted_logits(model, hidden[_wanted(works)])
    else:
        rows, hidden = _step(model.core, cache, works, _wanted(works), layers)
    found, end, told = [], 0, 0
    # Cutting tensors takes longer than all else here.
    no_logits, no_states = rows[:0], hidden[:0]
    for work in works:
        end, told = end + len(work.token_ids), told + work.wanted
        logits = rows[told - work.wanted : told] if work.wanted else no_logits
        # As in DoLa's own code, the output matrix is applied to the earlier state as it is, without the final norm.
        early = [wanted_logits(model, layers[layer][end - work.wanted : end]) for layer in work.layers if work.wanted]
        states = hidden[end - work.states : end] if work.states else no_states
        found.append(NetworkOutput(logits, states, torch.stack(early) if early else no_logits))
    return found


def _number(work: Work) -> int:
    return 0 if work.adapter is None else work.adapter.number


def _wanted(works: Sequence[Work]) -> list[int]:
    """The rows of a pass whose final states are asked for."""
    ends = accumulate(len(work.token_ids) for work in works)
    return [row for work, end in zip(works, ends, strict=True) for row in range(end - work.wanted, end)]


def _run(model: Decoder, cache: SlotCache, works: Sequence[Work], layers: dict[int, Tensor] | None = None) -> Tensor:
    """The final states of all rows read, `[padded rows, hidden_size]`; those below `layers` are filled in there."""
    if model.core is not None:
        return _step(model.core, cache, works, (), layers)[1]
    reading = _Reading(cache, works, model)
    padded = model.padded_rows(reading.rows)
    tokens = torch.zeros(1, padded, dtype=torch.int64)
    tokens[0, : reading.rows] = torch.tensor([token_id for work in works for token_id in work.token_ids])
    positions = torch.zeros(1, padded, dtype=torch.int64, device=model.device)
    positions[0, : reading.rows] = reading.positions

    def observe(layer: int, state: Tensor) -> None:
        if layers is not None and layer in layers:
            layers[layer] = state[0]

    with mixing(_groups(works, model.device)):
        return model.hidden(tokens.to(model.device), positions, reading.attend, observe if layers else None)[0]


def _groups(works: Sequence[Work], device: torch.device) -> Groups:
    """The rows of a pass that have an adapter, by adapter."""
    rows: dict[LiveAdapter, list[int]] = {}
    end = 0
    for work in works:
        begin, end = end, end + len(work.token_ids)
        if work.adapter is not None:
            rows.setdefault(work.adapter, []).extend(range(begin, end))
    return [(torch.tensor(numbers, device=device), adapter) for adapter, numbers in rows.items()]


def _step(
    core: Core, cache: SlotCache, works: Sequence[Work], wanted: Sequence[int], layers: dict[int, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """As `_run` with the native core, and before that the logits of the `wanted` rows."""
    assert cache.native is not None, "a cache belongs to the network that it was made for"
    kept = list(layers or ())
    spans = [(work.slot, work.start, work.token_ids) for work in works]
    adapters = [None if work.adapter is None else work.adapter.core for work in works]
    logits, states, *early = core.step(cache.native, spans, wanted, kept, adapters if any(adapters) else ())
    if layers is not None:
        layers.update(zip(kept, early, strict=True))
    return logits, states


@torch.inference_mode()
def wanted_logits(model: Decoder, hidden: Tensor) -> Tensor:
    """Logits `[R, vocab_size]` of `hidden [R, hidden_size]`, with the row counts that keep every row's bits."""
    if not len(hidden):
        return hidden.new_empty(0, model.config.vocab_size)
    if model.core is not None:
        return model.core.logits(hidden)
    parts = []
    for part in torch.split(hidden, LOGIT_ROWS):
        missing = model.padded_rows(len(part)) - len(part)
        parts.append(model.logits(torch.nn.functional.pad(part, (0, 0, 0, missing)))[: len(part)])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Group:
    """Rows that attend together: numbers of the pass's `rows [slots, count]` for each of the slots from `first_slot` to
    `last_slot`; `length` keys are at hand, of which each row sees those up to its own position, `sees [slots, count]`.
    """

    def __init__(self, first_slot: int, rows: Tensor, length: int, sees: Tensor, least: int) -> None:
        self.rows, self.length = rows, length
        self.slots = slice(first_slot, first_slot + len(rows))
        self._sees, self._least = sees, least
        self._hidden: dict[int | None, tuple[int, Tensor]] = {}

    def hidden(self, window: int | None) -> tuple[int, Tensor]:
        """The first block of keys that any row sees, and which keys from there on are not seen, `[slots, 1, 1, count,
        keys]`, by rows that see `window` keys each (None: all).

        To leave out a block that a row does not see changes no bit of its result: it would add zeros.
        """
        if window not in self._hidden:
            first = 0 if window is None else max(0, self._least - window + 1) // KEY_BLOCK
            keys = torch.arange(first * KEY_BLOCK, self.length, device=self._sees.device)
            sees = self._sees.unsqueeze(-1)
            hidden = keys > sees
            if window is not None:
                hidden |= keys <= sees - window
            self._hidden[window] = first, hidden.unsqueeze(1).unsqueeze(1)
        return self._hidden[window]


class _Reading:
    """One pass: where its rows belong, and attention over the cache for them."""

    def __init__(self, cache: SlotCache, works: Sequence[Work], model: Decoder) -> None:
        self.cache, self.query_tile, self.key_step = cache, model.query_tile, model.key_step
        device = self.device = model.device
        lengths = [len(work.token_ids) for work in works]
        self.rows = sum(lengths)
        firsts = [sum(lengths[:index]) for index in range(len(works))]
        self.positions = torch.tensor(
            [work.start + offset for work in works for offset in range(len(work.token_ids))], device=device
        )
        slots = torch.tensor([work.slot for work in works for _ in work.token_ids], device=device)
        self.places = Places(slots, self.positions)
        single = sorted((work.slot, first, work.start) for work, first in zip(works, firsts, strict=True)
                        if len(work.token_ids) == 1)  # fmt: skip
        self.groups = [self._chunk(work, first) for work, first in zip(works, firsts, strict=True)
                       if len(work.token_ids) > 1]  # fmt: skip
        self.groups += [self._run(run) for run in _runs(single, model.config)]

    def _chunk(self, work: Work, first: int) -> _Group:
        count, end = len(work.token_ids), work.start + len(work.token_ids)
        sees = torch.arange(work.start, end, device=self.device).unsqueeze(0)
        rows = torch.arange(first, first + count, device=self.device).unsqueeze(0)
        return _Group(work.slot, rows, _round_up(end, self.key_step), sees, work.start)

    def _run(self, run: list[tuple[int, int, int]]) -> _Group:
        starts = [start for _, _, start in run]
        sees = torch.tensor(starts, device=self.device).view(-1, 1)
        rows = torch.tensor([[first] for _, first, _ in run], device=self.device)
        return _Group(run[0][0], rows, _round_up(max(starts) + 1, self.key_step), sees, min(starts))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, softcap: float | None = None
    ) -> Tensor:
        """See `model.transformer.Attend`; B = 1 and T = the rows of the pass, padded."""
        new_keys, new_values = (each[0, :, : self.rows].transpose(0, 1).float() for each in (k, v))
        self.cache.write(layer, self.places, new_keys, new_values)
        keys, values = self.cache.layer(layer)
        heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[3]
        group_size = heads // kv_heads
        queries = q[0].transpose(0, 1).float()
        mixed = torch.zeros(q.shape[2], heads, size, device=q.device)
        for group in self.groups:
            slots, count = group.rows.shape
            part = queries[group.rows].view(slots, count, kv_heads, group_size, size).permute(0, 2, 3, 1, 4)
            first, hidden = group.hidden(window)
            hidden = hidden.expand(-1, -1, group_size, -1, -1).reshape(slots, 1, group_size * count, -1)
            result = block_attention(
                part.reshape(slots, kv_heads, group_size * count, size),
                keys[group.slots, :, first:],
                values[group.slots, :, first * KEY_BLOCK : group.length],
                hidden,
                self.query_tile,
                softcap,
            )
            result = result.view(slots, kv_heads, group_size, count, size).permute(0, 3, 1, 2, 4)
            mixed[group.rows] = result.reshape(slots, count, heads, size)
        return mixed.transpose(0, 1).unsqueeze(0).to(v.dtype)


def _runs(single: list[tuple[int, int, int]], config: ModelConfig) -> list[list[tuple[int, int, int]]]:
    """`(slot, row, position)` of single tokens, sorted, in groups of consecutive slots of about the same length."""
    runs: list[list[tuple[int, int, int]]] = []
    longest = taken = 0
    for item in single:
        keys = item[2] + 1
        if runs and item[0] == runs[-1][-1][0] + 1:
            # Everybody in a group reads as many keys as its longest sequence has.
            more = max(longest, keys) * (len(runs[-1]) + 1) - taken - keys
            if more * config.num_kv_heads * config.head_dim <= SPLIT_NUMBERS:
                runs[-1].append(item)
                longest, taken = max(longest, keys), max(longest, keys) * len(runs[-1])
                continue
        runs.append([item])
        longest = taken = keys
    return runs


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        # calloc: pages that were never written take no memory, and read as zeros.
        return torch.from_numpy(numpy.zeros(shape, dtype=numpy.float32))
    return torch.zeros(shape, device=device)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
