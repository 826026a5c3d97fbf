"""A decoder's weights in the form that the kernels want, and passes of the network over a cache of its own."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import numpy
import torch
from torch import Tensor, nn

from topkapi.model.config import ModelConfig, Rope
from topkapi.model.decoding.scan import Ahead, Drawing
from topkapi.model.layers import Norm
from topkapi.model.linear import Linear
from topkapi.model.native import library as interface
from topkapi.model.native.library import c_int, c_pointer, check
from topkapi.model.native.scanning import Scanner
from topkapi.model.rotary import rotary_angles
from topkapi.model.storage.gguf_blocks import KINDS as BLOCK_KINDS
from topkapi.model.storage.gguf_blocks import Blocks
from topkapi.model.transformer import Block, Decoder

HeldIn = Literal["float32", "bfloat16", "int8", "int4", "w8a8", "w4a8"]
FORMATS: dict[HeldIn, int] = {"float32": 0, "bfloat16": 1, "int8": 7, "int4": 8, "w8a8": 9, "w4a8": 10}
"""What matrices can be held in, and the number by which the core knows it."""

# Embedding and output matrix have eight bits where the layers have four.
_OUTER: dict[HeldIn, HeldIn] = {"int4": "int8", "w4a8": "w8a8"}

CACHES = {"float32": 0, "float16": 1, "int8": 2}
"""What keys and values can be held in, and the number by which the core knows it."""

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""What weights are stored as, by GGUF's numbers for it."""

ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu_squared": 3}
"""The nonlinearities of feed-forward layers, by `ModelConfig`'s names, and the core's numbers for them."""

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer in the order in which the core knows them (`Adapted` in network.h)."""

KEYS = 16
"""Positions that lie together in the cache."""


class Core:
    """The network of `model` as the core computes it; `level` is the instruction set."""

    def __init__(
        self, model: Decoder, held_in: HeldIn, *, level: str | None = None, threads: int | None = None
    ) -> None:
        library = interface.library()
        assert library is not None, "asked for where there is a core"
        self._library = library
        self.held_in: str = kind_of(model) or held_in
        config = self._config = model.config
        self._shape = _shape(config)
        self.level = level or interface.levels()[-1]
        self._handle = c_pointer()
        workers = interface.shared_threads(threads or torch.get_num_threads())
        self.scanner = Scanner(self.level, threads)
        made = ctypes.addressof(self._handle)
        check(library.topkapi_network_new(self._shape_at, interface.levels().index(self.level), workers, made))
        format_number = FORMATS[held_in]
        ropes = [config.rope(layer) for layer in range(config.num_layers)]
        kinds: list[Rope] = []
        kinds += [rope for at, rope in enumerate(ropes) if rope is not None and rope not in ropes[:at]]
        for index, block in enumerate(model.layers):
            rope = ropes[index]
            given = _Given(format_number).layer(cast(Block, block), -1 if rope is None else kinds.index(rope))
            check(library.topkapi_network_layer(self._handle, index, ctypes.addressof(given.structure)))
        outer = _Given(FORMATS[_OUTER.get(held_in, held_in)]).outer(model)
        check(library.topkapi_network_outer(self._handle, ctypes.addressof(outer.structure)))
        self._rotary = _Angles(kinds) if kinds else None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.topkapi_network_free(self._handle)

    @property
    def _shape_at(self) -> int:
        return ctypes.addressof(self._shape)

    def slots(self, count: int, capacity: int, held_in: str = "float32") -> Slots:
        """A cache for `count` sequences of up to `capacity` tokens, whose keys and values are one of `CACHES`."""
        return Slots(self, count, capacity, held_in)

    def token_bytes(self, held_in: str) -> int:
        """Memory that keys and values of one token take in one of `CACHES`, on average over a block."""
        return int(self._library.topkapi_block_bytes(self._shape_at, CACHES[held_in])) // KEYS

    def run(
        self, slots: Slots, works: Sequence[tuple[int, int, Sequence[int]]], kept: Sequence[int] = ()
    ) -> list[Tensor]:
        """Read `(slot, start, token ids)`, a slot once at most.

        The final states of all rows `[R, hidden_size]` float32, then the states below each of the layers `kept`.
        """
        return self.step(slots, works, (), kept)[1:]

    def adapter(self, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Adapter:
        """What is added to matrices of the layers, by their names in `Decoder`, for the works that name it: `up
        [outputs, rank]` times `down [rank, inputs]`."""
        return Adapter(self, matrices)

    def step(
        self,
        slots: Slots,
        works: Sequence[tuple[int, int, Sequence[int]]],
        wanted: Sequence[int],
        kept: Sequence[int] = (),
        adapters: Sequence[Adapter | None] = (),
    ) -> list[Tensor]:
        """As `run`, and before what that gives the logits of the `wanted` rows, `[wanted, vocab_size]` float32.

        With `adapters` each of the works has its own, or none.
        """
        work, states, early, _alive = self._pass(works, kept, adapters, 1)
        logits = self.scanner.step(self._handle, slots.handle, work, wanted, self._config.vocab_size)
        return [logits, states, *early]

    def steps(
        self,
        slots: Slots,
        works: Sequence[tuple[int, int, Sequence[int]]],
        drawing: Drawing,
        ahead: Ahead,
        adapters: Sequence[Adapter | None] = (),
    ) -> list[tuple[float, list[int]]]:
        """As `step` again and again, each of the works reading a token and then what was drawn for it: after how many
        seconds each step was done, and its tokens."""
        work, _, _, _alive = self._pass(works, (), adapters, ahead.most)
        return self.scanner.steps(self._handle, slots.handle, work, drawing, ahead, self._config.vocab_size)

    def _pass(
        self,
        works: Sequence[tuple[int, int, Sequence[int]]],
        kept: Sequence[int],
        adapters: Sequence[Adapter | None],
        steps: int,
    ) -> tuple[int, Tensor, Tensor, object]:
        """The address of a pass as the core is told of it, the first of so many steps, where its states will be and
        those below the layers `kept`, and what has to live as long."""
        spans = (interface.Span * len(works))()
        tokens: list[int] = []
        most = 0
        for index, (slot, start, token_ids) in enumerate(works):
            spans[index] = interface.Span(slot, len(tokens), len(token_ids), start)
            tokens += token_ids
            most = max(most, start + len(token_ids) + steps - 1)
        rows, hidden = len(tokens), self._config.hidden_size
        states = torch.empty(rows, hidden)
        layers = (c_int * max(1, len(kept)))(*kept)
        early = torch.empty(len(kept), rows, hidden)
        ids = numpy.array(tokens, dtype=numpy.int32)
        beside = (c_pointer * max(1, len(adapters)))(*(None if each is None else each.handle for each in adapters))
        cosines, sines = (None, None) if self._rotary is None else self._rotary.up_to(most)
        work = interface.Pass(
            rows, len(works), ctypes.addressof(spans), ids.ctypes.data, states.data_ptr(),
            None if cosines is None else cosines.data_ptr(), None if sines is None else sines.data_ptr(),
            *((0, 0) if cosines is None else cosines.shape[:2]), len(kept), ctypes.addressof(layers), early.data_ptr(),
            ctypes.addressof(beside) if adapters else None,
        )  # fmt: skip
        alive = (work, spans, ids, states, layers, early, beside, cosines, sines)
        return ctypes.addressof(work), states, early, alive

    def logits(self, states: Tensor) -> Tensor:
        """Scores of every token: `[R, hidden_size]` float32 -> `[R, vocab_size]` float32."""
        states = states.contiguous()
        assert states.shape[1] == self._config.hidden_size and states.dtype == torch.float32
        scores = torch.empty(len(states), self._config.vocab_size)
        check(self._library.topkapi_logits(self._handle, states.data_ptr(), len(states), scores.data_ptr()))
        return scores


class Slots:
    """Keys and values of sequences, in blocks of `KEYS` positions; memory is taken as blocks are written."""

    def __init__(self, core: Core, count: int, capacity: int, held_in: str) -> None:
        self._library, number = core._library, CACHES[held_in]
        blocks = -(-capacity // KEYS)
        # calloc: what was never written takes no memory, and reads as zeros.
        self._memory = numpy.zeros((count, blocks, core.token_bytes(held_in) * KEYS), dtype=numpy.uint8)
        self.handle = c_pointer()
        made, memory = ctypes.addressof(self.handle), self._memory.ctypes.data
        check(self._library.topkapi_slots_new(core._shape_at, number, count, blocks, memory, made))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.topkapi_slots_free(self.handle)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Give slot `target` the tokens from `start` to before `end` of slot `source`; before that they are alike."""
        blocks = slice(start // KEYS, -(-end // KEYS))
        self._memory[target, blocks] = self._memory[source, blocks]


class Adapter:
    """An adapter's matrices as a core computes with them. What is running with it holds on to it."""

    def __init__(self, core: Core, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._library = core._library
        self.handle = c_pointer()
        check(self._library.topkapi_adapter_new(core._handle, ctypes.addressof(self.handle)))
        for name, pair in matrices.items():
            _, layer, _, last = name.split(".")
            sources, alive = [], []
            for matrix in pair:
                held = matrix.detach().float().contiguous()
                alive.append(held)
                sources.append(
                    interface.Source(held.data_ptr(), None, KINDS[held.dtype], FORMATS["float32"], *held.shape)
                )
            down, up = map(ctypes.addressof, sources)
            number = ADAPTED.index(last)
            check(self._library.topkapi_adapter_matrix(core._handle, self.handle, int(layer), number, down, up))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.topkapi_adapter_free(self.handle)


def _shape(config: ModelConfig) -> ctypes.Structure:
    """What the core is told of a network beside its weights."""
    rotated = 0 if config.learned_positions else int(config.head_dim * config.partial_rotary_factor)
    head_norm = 2 if config.traits.qk_norm_whole else int(config.qk_norm)
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return interface.Shape(
        config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
        config.num_kv_heads, config.head_dim, config.layer_norm, config.gated_mlp, rotated + rotated % 2, head_norm,
        config.context_length if config.learned_positions else 0, ACTIVATIONS[config.nonlinearity],
        config.parallel_residual, config.norm_eps, config.embedding_scale, scale, config.attention_softcap or 0.0,
        config.residual_multiplier, config.logit_divisor, config.logit_softcap or 0.0,
    )  # fmt: skip


class _Angles:
    """Rotary positions of some kinds as the network computes them, for those met so far."""

    def __init__(self, kinds: Sequence[Rope]) -> None:
        self._kinds = [rotary_angles(rope) for rope in kinds]
        self._lock = threading.Lock()
        self._made = self._make(256)

    def up_to(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[kinds, positions or more, rotated / 2]`."""
        with self._lock:
            if positions > self._made[0].shape[1]:
                self._made = self._make(max(positions, 2 * self._made[0].shape[1]))
            return self._made

    def _make(self, count: int) -> tuple[Tensor, Tensor]:
        numbers = torch.arange(count).float().unsqueeze(-1)
        angles = [(numbers * frequencies, factor) for frequencies, factor in self._kinds]
        cosines = torch.stack([each.cos() * factor for each, factor in angles])
        return cosines, torch.stack([each.sin() * factor for each, factor in angles])


class _Given:
    """Weights as the core is given them; what the pointers lead to lives as long as this does."""

    def __init__(self, format_number: int) -> None:
        # With blocks, what is stored as floats stays what it is.
        self._format, self._alive = format_number, list[object]()
        self.structure: ctypes.Structure

    def layer(self, block: Block, angles: int) -> _Given:
        """The weights of one layer; `angles` says which kind of rotary positions it has, -1 for none."""
        attention, mlp = block.self_attn, block.mlp
        matrices: list[Linear | None] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        matrices += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms: list[Norm | None] = [None if name is None else getattr(block, name) for name in block.norm_names]
        norms += [attention.q_norm, attention.k_norm]
        self.structure = interface.LayerWeights(
            *(self._matrix(linear) for linear in matrices), *(self._norm(norm) for norm in norms),
            attention.window or 0, angles,
        )  # fmt: skip
        return self

    def outer(self, model: Decoder) -> _Given:
        """Embeddings, the last norm and the output matrix."""
        positions = model.embed_positions
        self.structure = interface.OuterWeights(
            interface.Source() if model.config.tie_embeddings else self._matrix(model.embed_tokens),
            self._matrix(model.lm_head),
            self._norm(model.norm),
            self._vector(None if positions is None else positions.weight),
            self._norm(model.embed_norm),
        )
        return self

    def _norm(self, norm: Norm | None) -> ctypes.Structure:
        if norm is None:
            return interface.NormWeights()
        weight = torch.ones(norm.size) if norm.weight is None else norm.weight
        if norm.offset:
            weight = weight.detach().float() + norm.offset
        return interface.NormWeights(self._vector(weight), self._vector(norm.bias))

    def _matrix(self, module: Linear | nn.Embedding | None) -> ctypes.Structure:
        if module is None:
            return interface.Source()
        bias = self._vector(module.bias) if isinstance(module, Linear) else None
        held: Blocks | None = getattr(module, "blocks", None)
        weight = module.weight.detach()
        outputs, inputs = weight.shape
        if held is not None:
            self._alive.append(held.rows)
            return interface.Source(held.rows.ctypes.data, bias, BLOCK_KINDS[held.kind], 0, outputs, inputs)
        weight = weight.contiguous()
        self._alive.append(weight)
        return interface.Source(weight.data_ptr(), bias, KINDS[weight.dtype], self._format, outputs, inputs)

    def _vector(self, vector: Tensor | None) -> int | None:
        if vector is None:
            return None
        held = vector.detach().float().contiguous()
        self._alive.append(held)
        return held.data_ptr()


def in_blocks(model: Decoder) -> list[Blocks]:
    """The matrices of `model` that a GGUF file holds in blocks."""
    found = (getattr(module, "blocks", None) for module in model.modules())
    return [held for held in found if held is not None]


def kind_of(model: Decoder) -> str | None:
    """The kind of blocks that most matrices are in, None where there are no blocks."""
    kinds = Counter(held.kind for held in in_blocks(model))
    return kinds.most_common(1)[0][0] if kinds else None


def let_go(model: Decoder) -> None:
    """Let the parameters of `model` that the core holds keep their shapes and give up their memory."""
    for module in model.modules():
        if isinstance(module, Linear | nn.Embedding):
            module.blocks = None  # type: ignore[assignment]
            # Not `empty_like`, for which PyTorch imports its compiler where the weight is one of these already.
            empty = torch.empty(module.weight.shape, dtype=module.weight.dtype, device="meta")
            module.weight = nn.Parameter(empty, requires_grad=False)
    for parameter in model.parameters():
        if not parameter.is_meta:
            # Vectors may be parts of the mapped file, all of which would stay for their sake.
            parameter.data = parameter.data.clone()
