"""GGUF files as Hugging Face checkpoints: configuration, tensor names and layouts, tokenizer, chat template.

Read through the `gguf` package. Differences from Hugging Face that are undone here: matrices are stored in blocks of
quantised numbers, llama's query and key rows are interleaved for another form of rotary positions, gpt2's matrices
lie transposed to its Conv1D, and gemma's norms hold the whole weight. Tensors are dequantised one at a time.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch

from topkapi.model.config import ModelConfig
from topkapi.model.core_fields import beyond_core
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.gguf_blocks import blocks_of
from topkapi.model.storage.gguf_configuration import OTHER_TENSORS, configuration
from topkapi.model.storage.gguf_keys import check_keys
from topkapi.model.storage.gguf_names import ARCHITECTURES, INTERLEAVED, OUTER, layer_names
from topkapi.model.storage.gguf_sampling import read_sampling
from topkapi.model.storage.gguf_vocabulary import read_vocabulary
from topkapi.model.storage.layouts import Layout, layout_of
from topkapi.model.text.tokenizer import Tokenizer

_TENSOR_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
_MOST_FIELDS, _MOST_ITEMS, _MOST_DIMENSIONS, _LONGEST_TEXT = 1 << 16, 1 << 22, 4, 1 << 24
"""More than any file has of fields or tensors, of items in lists (a vocabulary of 300,000 has a million), and so on."""


def read_gguf(
    path: str | Path, *, blocks: bool = False
) -> tuple[dict[str, Any], Iterator[tuple[str, torch.Tensor]], Tokenizer, dict[str, str], dict[str, Any]]:
    """The parts of a checkpoint in a GGUF file.

    Returns a Hugging Face configuration; Hugging Face tensor names with their tensors, each made when it is asked for
    (float16 and bfloat16 as stored, quantised ones as float32); the tokenizer; the sources of chat templates by their
    names; and the content of a `generation_config.json`. With `blocks`, matrices in blocks that `model.gguf_blocks`
    knows come as those instead. Raises CheckpointError for what is missing, truncated or not supported, before the
    first tensor is read.
    """
    package = gguf_package()
    path = Path(path)
    reader = _open(package, path)
    try:
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}", hint="copy or download the file again") from error
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a model of architecture {architecture!r}, which is not supported",
            hint=f"supported: {', '.join(ARCHITECTURES)}",
        )
    check_keys(metadata, str(architecture))
    if metadata.get("split.count") not in (None, 0, 1):
        raise CheckpointError(
            f"{path} is one part of several", hint="join them with llama.cpp's llama-gguf-split --merge"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check_types(package, path, reader.tensors)
    try:
        config = configuration(metadata, str(architecture), tensors)
        _check(path, config)
        tokenizer, generation = read_vocabulary(metadata)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} lacks or misstates {error}", hint="convert or download the model again"
        ) from error
    generation |= read_sampling(metadata)
    key = "tokenizer.chat_template"
    named = {name: text for name, text in metadata.items() if name == key or name.startswith(f"{key}.")}
    templates = {name.removeprefix(key).removeprefix(".") or "default": text for name, text in named.items() if text}
    return config, _tensors(package, config, reader.tensors, blocks), tokenizer, templates, generation


def gguf_package(doing: str = "reading") -> ModuleType:
    """The `gguf` package. Raises `CheckpointError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{doing} GGUF files needs the gguf package", hint="pip install 'topkapi[gguf]'"
        ) from None
    return gguf


def _open(package: ModuleType, path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if start != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file", hint="give a .gguf file or a checkpoint directory")
    try:
        reader = _reader(package, path)
    except Exception as error:  # the reader raises whatever numpy raises where the data ends early
        raise CheckpointError(
            f"{path} is truncated or damaged: {error}", hint="copy or download the file again"
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(f"{path} is in the byte order of another machine", hint="convert it for this one")
    return reader


def _reader(package: ModuleType, path: Path) -> Any:
    class PlainReader(package.GGUFReader):  # type: ignore[misc, name-defined]
        """The package's reader on a plain array, which refuses what no file of that size can hold.

        Slices of a `numpy.memmap` take four times as long to make.
        """

        _items = _MOST_ITEMS

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

        def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> Any:
            if offset + int(count) * np.dtype(dtype).itemsize > len(self._data):
                raise ValueError("it ends in the middle of what it announces")
            return super()._get(offset, dtype, count, *order, **named)

        def _get_str(self, offset: int) -> Any:
            if int(self._get(offset, np.uint64)[0]) > _LONGEST_TEXT:
                raise ValueError(f"it announces a text of more than {_LONGEST_TEXT:,} bytes")
            return super()._get_str(offset)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == package.GGUFValueType.ARRAY:
                kind, length = self._get(orig_offs, np.uint32)[0], int(self._get(orig_offs + 4, np.uint64)[0])
                self._items -= length
                if self._items < 0:
                    raise ValueError(f"it announces lists of more than {_MOST_ITEMS:,} items")
                if kind == package.GGUFValueType.ARRAY:
                    raise ValueError("it holds lists of lists")
            return super()._get_field_parts(orig_offs, raw_type)

        def _build_fields(self, offs: int, count: int) -> Any:
            return super()._build_fields(offs, _checked_count(count))

        def _build_tensor_info(self, offs: int, count: int) -> Any:
            return super()._build_tensor_info(offs, _checked_count(count))

        def _get_tensor_info_field(self, orig_offs: int) -> Any:
            place = orig_offs + 8 + int(self._get(orig_offs, np.uint64)[0])
            dimensions = int(self._get(place, np.uint32)[0])
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor of it has {dimensions:,} dimensions")
            sizes = self._get(place + 4, np.uint64, dimensions).tolist()
            # No kind of tensor takes less than a bit per number, and a product of these would run over.
            if math.prod(sizes) > 8 * len(self._data):
                raise ValueError(f"a tensor of {' x '.join(map(str, sizes))} has no room in it")
            return super()._get_tensor_info_field(orig_offs)

    return PlainReader(path)


def _checked_count(count: int) -> int:
    if int(count) > _MOST_FIELDS:
        raise ValueError(f"it announces {int(count):,} fields or tensors")
    return int(count)


def _check_types(package: ModuleType, path: Path, tensors: Sequence[Any]) -> None:
    for tensor in {tensor.tensor_type: tensor for tensor in tensors}.values():
        block = np.zeros(package.GGML_QUANT_SIZES[tensor.tensor_type][1], dtype=np.uint8)
        try:
            package.dequantize(block, tensor.tensor_type)
        except NotImplementedError:
            raise CheckpointError(
                f"{path}: the quantisation {tensor.tensor_type.name} of {tensor.name} is not supported",
                hint="use a file quantised as F16, Q8_0, Q4_0, Q4_1 or one of the K-quants",
            ) from None


def _check(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse sizes and numbers that no network has, as those of the file that says them."""
    try:
        ModelConfig.from_hugging_face(config)
    except CheckpointError as error:
        message = error.message.removeprefix("config.json: ")
        raise CheckpointError(f"{path}: {message}", field=error.field, hint=error.hint) from error


def _tensors(
    package: ModuleType, raw: Mapping[str, Any], stored: Sequence[Any], in_blocks: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    config = ModelConfig.from_hugging_face(raw)
    traits, layout = config.traits, layout_of(config)
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    modules: dict[str, list[str]] = {}
    for ours, theirs in layer_names(traits).items():
        modules.setdefault(theirs, []).append(ours)
    # In blocks the native core alone computes.
    in_blocks = in_blocks and not beyond_core(config)
    for tensor in stored:
        if tensor.name in OTHER_TENSORS:
            continue
        match = _TENSOR_NAME.fullmatch(tensor.name)
        layer, kind, ending = match.groups() if match else (None, "", "")
        names = [outer[kind]] if layer is None and kind in outer else modules.get(kind, []) if layer else []
        if not names or (kind == "position_embd" and not config.learned_positions):
            raise CheckpointError(f"the GGUF file holds a tensor {tensor.name} that its architecture does not have")
        blocks = blocks_of(tensor) if in_blocks and kind != "position_embd" else None
        data = _dequantised(package, tensor) if blocks is None else cast(torch.Tensor, blocks)
        if traits.gguf in INTERLEAVED and kind in ("attn_q", "attn_k"):
            heads = config.num_heads if kind == "attn_q" else config.num_kv_heads
            # The converter put the two halves of each head's rows in turn; put the first half first again.
            if blocks is not None:
                data = cast(torch.Tensor, blocks.interleaved(heads))
            else:
                pairs = data.reshape(heads, data.shape[0] // heads // 2, 2, *data.shape[1:])
                data = pairs.transpose(1, 2).reshape(data.shape)
        if traits.norm_offset and kind.endswith("norm"):
            data = data.float() - traits.norm_offset
        if len(names) > 1 and layout.by_head:
            # By numbers of rows, as above.
            rows = Layout().part(config, tensor.name, names, torch.arange(data.shape[0]))
            data = data[layout.join(config, rows)]
        if layout.transposed and layer is not None and data.ndim == 2:
            data = data.t().contiguous()
        ours = names[0] if layer is None else f"layers.{layer}.{names[0]}"
        yield f"{layout.theirs(ours)}.{ending}", data


def _dequantised(package: ModuleType, tensor: Any) -> torch.Tensor:
    # The file is mapped read-only, so what is handed out is always a copy.
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if tensor.tensor_type.name in ("F32", "F16"):
        return torch.from_numpy(np.array(tensor.data)).reshape(shape)
    if tensor.tensor_type.name == "BF16":
        return torch.from_numpy(np.array(tensor.data)).view(torch.bfloat16).reshape(shape)
    values = package.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(shape)
