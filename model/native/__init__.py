"""The native core: a whole pass of the network over the slot cache as one call of compiled code.

It computes what `model.transformer` and `model.cache` compute with PyTorch, which stay the reference and what runs
where there is no core. A row's sums have one order whatever is computed beside it, on any number of threads and by
whichever instructions: its bits are the same in every batch and on every processor.

The core is C++ without PyTorch's headers behind a C interface: `network.cpp` is the pass, `kernels.h` what it is made
of, `vectors.h` sixteen numbers at a time for each instruction set, `threads.h` the threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy
import torch
from torch import Tensor, nn

from model.errors import EngineError
from model.linear import Linear

if TYPE_CHECKING:
    from model.transformer import Block, Decoder

HeldIn = Literal["float32", "bfloat16", "int8"]
FORMATS: dict[HeldIn, int] = {"float32": 0, "bfloat16": 1, "int8": 2}
"""What matrices can be held in, and the number by which the core knows it."""

KEYS = 16
"""Positions that lie together in the cache."""

_int, _pointer = ctypes.c_int32, ctypes.c_void_p


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# As core.h and network.cpp declare them.
_Shape = _structure(
    "Shape",
    **dict.fromkeys(
        ("vocabulary", "hidden", "inner", "layers", "heads", "key_heads", "head_size", "layer_norm", "gated", "rotary",
         "head_norm"), _int),
    epsilon=ctypes.c_float,
)  # fmt: skip
_LayerWeights = _structure(
    "LayerWeights",
    **dict.fromkeys(
        ("query_key_value", "query_key_value_bias", "output", "output_bias", "up", "up_bias", "down", "down_bias",
         "norm", "norm_bias", "post_norm", "post_norm_bias", "query_norm", "key_norm"), _pointer),
)  # fmt: skip
_Span = _structure("Span", slot=_int, first=_int, count=_int, position=_int)
_Pass = _structure(
    "Pass", rows=_int, spans=_int, span=_pointer, states=_pointer, cosines=_pointer, sines=_pointer, kept=_int,
    kept_layers=_pointer, kept_states=_pointer,
)  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """The compiled core, or None where it was not built."""
    found = sorted(Path(__file__).parent.glob("_core*.so"))
    if not found:
        return None
    core = ctypes.CDLL(str(found[0]))
    core.topkapi_level_name.restype = ctypes.c_char_p
    core.topkapi_threads_new.restype = _pointer
    core.topkapi_block_floats.restype = ctypes.c_int64
    core.topkapi_block_floats.argtypes = [_pointer]
    for name in ("threads", "network", "slots"):
        free = getattr(core, f"topkapi_{name}_free")
        free.argtypes, free.restype = [_pointer], None
    core.topkapi_network_new.argtypes = [_pointer, _int, _pointer, _pointer]
    core.topkapi_network_layer.argtypes = [_pointer, _int, _pointer, _int]
    core.topkapi_network_head.argtypes = [_pointer, _pointer, _pointer, _pointer, _int]
    core.topkapi_slots_new.argtypes = [_pointer, _int, _pointer, _pointer]
    core.topkapi_run.argtypes = [_pointer, _pointer, _pointer]
    core.topkapi_logits.argtypes = [_pointer, _pointer, _int, _pointer]
    return core


@cache
def levels() -> tuple[str, ...]:
    """The instruction sets that this processor and the core have in common, the plainest first; none without a core."""
    core = library()
    return () if core is None else tuple(core.topkapi_level_name(at).decode() for at in range(core.topkapi_levels()))


@cache
def _threads(count: int) -> int:
    """Threads that networks share; they sleep while there is nothing to do, and live as long as the process."""
    core = library()
    made = None if core is None else core.topkapi_threads_new(count)
    if made is None:
        raise EngineError(f"{count} threads cannot be started")
    return int(made)


def _check(code: int) -> None:
    if code == 1:
        raise MemoryError("the native core has no memory left")
    if code:
        raise EngineError("the native core failed")


def can_hold(model: Decoder) -> bool:
    """Whether the core can compute this network: it was built, and the matrices are plain and on the CPU."""
    plain = all(
        module.product is None and module.adapter is None for module in model.modules() if isinstance(module, Linear)
    )
    return bool(levels()) and model.device.type == "cpu" and plain and model.trained_rows is None


def hold(model: Decoder, held_in: HeldIn, *, level: str | None = None, threads: int | None = None) -> None:
    """Have the core compute `model`, for inference and for good; its matrices are in one place only.

    `level` is one of `levels()` (None: the last), `threads` how many compute (None: as many as PyTorch uses).
    """
    model.core = Core(model, held_in, level=level, threads=threads)
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)


class Core:
    """A decoder's weights in the form that the kernels want, and passes of the network over slots."""

    def __init__(self, model: Decoder, held_in: HeldIn, *, level: str | None = None, threads: int | None = None) -> None:
        library_found = library()
        assert library_found is not None, "asked for where there is a core"
        self._library, self._model, self.held_in = library_found, model, held_in
        config = model.config
        self._shape = _Shape(
            config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads,
            config.num_kv_heads, config.head_dim, config.layer_norm, config.gated_mlp, not config.learned_positions,
            config.qk_norm, config.norm_eps,
        )  # fmt: skip
        self.level = level or levels()[-1]
        self._handle = _pointer()
        workers = _threads(threads or torch.get_num_threads())
        made = ctypes.addressof(self._handle)
        _check(self._library.topkapi_network_new(self._shape_at, levels().index(self.level), workers, made))
        for index, block in enumerate(model.layers):
            weights = {name: each.detach().float().contiguous() for name, each in _weights(cast("Block", block)).items()}
            pointers = _LayerWeights(**{name: tensor.data_ptr() for name, tensor in weights.items()})
            _check(
                self._library.topkapi_network_layer(
                    self._handle, index, ctypes.addressof(pointers), FORMATS[held_in]
                )
            )
        norm, head = model.norm.weight.detach().float(), model.lm_head.weight.detach().float().contiguous()
        bias = None if model.norm.bias is None else model.norm.bias.detach().float()
        bias_at = None if bias is None else bias.data_ptr()
        _check(
            self._library.topkapi_network_head(
                self._handle, norm.data_ptr(), bias_at, head.data_ptr(), FORMATS[held_in]
            )
        )

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.topkapi_network_free(self._handle)

    @property
    def _shape_at(self) -> int:
        return ctypes.addressof(self._shape)

    def slots(self, count: int, capacity: int) -> Slots:
        """A cache for `count` sequences of up to `capacity` tokens."""
        return Slots(self, count, capacity)

    def run(self, slots: Slots, works: Sequence[tuple[int, int, Sequence[int]]], kept: Sequence[int] = ()) -> list[Tensor]:
        """Read `(slot, start, token ids)`, a slot once at most.

        The final states of all rows `[R, hidden_size]` float32, then the states below each of the layers `kept`.
        """
        model = self._model
        tokens = torch.tensor([token_id for _, _, token_ids in works for token_id in token_ids])
        positions = torch.tensor([start + at for _, start, token_ids in works for at in range(len(token_ids))])
        embedded, rotary = model.embed(tokens.unsqueeze(0), positions.unsqueeze(0))
        states = embedded[0].contiguous()
        cosines, sines = (None, None) if rotary is None else (each[0, 0].contiguous() for each in rotary)
        spans, rows = (_Span * len(works))(), 0
        for index, (slot, start, token_ids) in enumerate(works):
            spans[index] = _Span(slot, rows, len(token_ids), start)
            rows += len(token_ids)
        layers = (_int * max(1, len(kept)))(*kept)
        early = torch.empty(len(kept), rows, model.config.hidden_size)
        work = _Pass(
            rows, len(works), ctypes.addressof(spans), states.data_ptr(),
            None if cosines is None else cosines.data_ptr(), None if sines is None else sines.data_ptr(), len(kept),
            ctypes.addressof(layers), early.data_ptr(),
        )  # fmt: skip
        _check(self._library.topkapi_run(self._handle, slots.handle, ctypes.addressof(work)))
        return [states, *early]

    def logits(self, states: Tensor) -> Tensor:
        """Scores of every token: `[R, hidden_size]` float32 -> `[R, vocab_size]` float32."""
        states = states.contiguous()
        scores = torch.empty(len(states), self._model.config.vocab_size)
        _check(self._library.topkapi_logits(self._handle, states.data_ptr(), len(states), scores.data_ptr()))
        return scores


class Slots:
    """Keys and values of sequences, in blocks of `KEYS` positions; memory is taken as blocks are written."""

    def __init__(self, core: Core, count: int, capacity: int) -> None:
        self._library = core._library
        blocks = -(-capacity // KEYS)
        block_floats = self._library.topkapi_block_floats(core._shape_at)
        # calloc: what was never written takes no memory, and reads as zeros.
        self._memory = numpy.zeros((count, blocks, block_floats), dtype=numpy.float32)
        self.handle = _pointer()
        made = ctypes.addressof(self.handle)
        _check(self._library.topkapi_slots_new(core._shape_at, blocks, self._memory.ctypes.data, made))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.topkapi_slots_free(self.handle)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Give slot `target` the tokens from `start` to before `end` of slot `source`; before that they are alike."""
        blocks = slice(start // KEYS, -(-end // KEYS))
        self._memory[target, blocks] = self._memory[source, blocks]


def _weights(block: Block) -> dict[str, Tensor]:
    attention, mlp = block.self_attn, block.mlp
    reading = [attention.q_proj, attention.k_proj, attention.v_proj]
    inner = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
    found = {
        "query_key_value": torch.cat([linear.weight for linear in reading]),
        "query_key_value_bias": _biases(reading),
        "output": attention.o_proj.weight,
        "output_bias": attention.o_proj.bias,
        "up": torch.cat([linear.weight for linear in inner]),
        "up_bias": _biases(inner),
        "down": mlp.down_proj.weight,
        "down_bias": mlp.down_proj.bias,
        "norm": block.input_layernorm.weight,
        "norm_bias": block.input_layernorm.bias,
        "post_norm": block.post_attention_layernorm.weight,
        "post_norm_bias": block.post_attention_layernorm.bias,
        "query_norm": None if attention.q_norm is None else attention.q_norm.weight,
        "key_norm": None if attention.k_norm is None else attention.k_norm.weight,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _biases(linears: Sequence[Linear]) -> Tensor | None:
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None
