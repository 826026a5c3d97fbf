"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

Read to be merged into a base's weights, tensor by tensor; written from a network that was trained with adapters. PEFT
names modules as transformers does: the gpt2 family's query, key and value matrices are one there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from topkapi.model.adapter import SMALLEST_SQUARE, Adapter, named_linears
from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.reading import read_json
from topkapi.model.storage.adapter_fields import refused
from topkapi.model.storage.layouts import layout_of
from topkapi.model.storage.location import ADAPTER_CONFIG
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.transformer import Decoder

CONFIG_FILE, WEIGHTS_FILE = ADAPTER_CONFIG, "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
_SECONDS_PER_PATTERN = 0.5
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to one matrix: `down [rank, inputs]`, `up [outputs, rank]`, DoRA's `magnitude [outputs]`."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """`weight [outputs, inputs]` with the adapter in it, float32."""
        total: Tensor = weight.float() + self.scale * (self.up.float() @ self.down.float())
        if self.magnitude is None:
            return total
        lengths = total.square().sum(1).clamp_min(SMALLEST_SQUARE).sqrt()
        return total * (self.magnitude.float() / lengths).unsqueeze(1)


@dataclass
class AdapterFiles:
    """A stored adapter, by names of `Decoder`'s parameters.

    `base` is the checkpoint it was trained on, as the file names it. `rows` are single rows that take the place of a
    matrix's own, `replaced` whole tensors. `untied` says that of a base whose input and output embedding are one
    matrix it makes two.
    """

    path: Path
    base: str | None
    matrices: dict[str, LowRank] = field(default_factory=dict)
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    untied: bool = False

    def merged(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`tensors` by parameter name with the adapter in them, each in the dtype that it came in.

        Raises `CheckpointError` where the adapter does not fit them, once all are read.
        """
        unused = {*self.matrices, *self.rows, *self.replaced}
        for name, tensor in self._with_output(tensors):
            if name in unused:
                unused.discard(name)
                tensor = self._merged(name, tensor)
            yield name, tensor
        if unused:
            raise self._misfit(f"changes {', '.join(sorted(unused)[:3])}, which the base does not have")

    def _with_output(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            if self.untied and name == "embed_tokens.weight":
                yield "lm_head.weight", tensor
            yield name, tensor

    def _merged(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.replaced:
            tensor = self.replaced[name].to(tensor.dtype)
        change = self.matrices.get(name)
        if change is not None:
            if (change.up.shape[0], change.down.shape[1]) != tensor.shape:
                shape = f"{change.up.shape[0]} x {change.down.shape[1]}"
                raise self._misfit(
                    f"is for a {name} of {shape}, and the base's is {' x '.join(map(str, tensor.shape))}"
                )
            return change.merged(tensor).to(tensor.dtype)
        if name not in self.rows:
            return tensor
        token_ids, rows = self.rows[name]
        size = max(len(tensor), max(token_ids) + 1)
        if rows.shape[1] != tensor.shape[1] or not set(range(len(tensor), size)) <= set(token_ids):
            raise self._misfit(f"has rows for {name} that do not continue the base's {list(tensor.shape)}")
        grown = torch.cat((tensor, tensor.new_zeros(size - len(tensor), tensor.shape[1])))
        return grown.index_copy(0, torch.tensor(token_ids), rows.to(tensor.dtype))

    def vocabulary_size(self, size: int) -> int:
        """Rows of the embedding with the adapter, of a base that has `size`."""
        added = [max(token_ids) + 1 for token_ids, _ in self.rows.values()]
        return max(size, *added, *(len(self.replaced[name]) for name in _EMBEDDINGS if name in self.replaced), 0)

    def _misfit(self, problem: str) -> CheckpointError:
        return CheckpointError(f"the adapter {self.path} {problem}", hint="name the base that it was trained on")


_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
_MATRIX = re.compile(r"lm_head|embed_tokens|layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj")


def read_settings(path: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises `CheckpointError` for a kind of adapter that is not LoRA or DoRA."""
    settings = read_json(path / CONFIG_FILE)
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path} is an adapter of kind {settings.get('peft_type')!r}", hint="LoRA and DoRA are supported"
        )
    if (found := refused(settings)) is not None:
        field_name, problem = found
        raise CheckpointError(
            f"the adapter {path} {problem}",
            field=field_name,
            hint="merge it with PEFT (merge_and_unload) and serve what that saves",
        )
    return settings


def read_adapter(path: Path, config: ModelConfig) -> AdapterFiles:
    """The adapter in `path`, which is to be merged into a base of the shape `config`.

    Raises `CheckpointError` naming the file or the module for what is missing, damaged or not supported.
    """
    settings = read_settings(path)
    found = AdapterFiles(path, settings.get("base_model_name_or_path"))
    changes: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in _tensors(path):
        name = name.removeprefix(_PREFIX)
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is not None:
            changes.setdefault(name.removesuffix(part), {})[part] = tensor
        elif name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            found.rows[_parameter(config, module, path)[0]] = (_token_ids(settings, module, path), tensor)
        elif ".lora_" in name:
            raise CheckpointError(
                f"the adapter {path} holds {name}, which is not supported",
                hint="merge it with PEFT (merge_and_unload) and serve what that saves",
            )
        elif ".original_module." not in name:
            # After a resize PEFT also stores what it replaced, and what takes its place under two names.
            whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    for module, parts in changes.items():
        for name, change in _low_rank(config, settings, module, parts, path):
            found.matrices[name] = change
    # Untied, so that nothing that names an output matrix is passed over.
    found.replaced = dict(from_hugging_face(replace(config, tie_embeddings=False), iter(whole.items())))
    if config.tie_embeddings:
        _settle_tied(found, settings)
    return found


def _settle_tied(found: AdapterFiles, settings: Mapping[str, Any]) -> None:
    """Make two matrices of the base's one input and output embedding where the adapter changes one of them alone."""
    together = bool(settings.get("ensure_weight_tying"))
    if "lm_head.weight" in found.rows or (together and "lm_head.weight" in found.matrices):
        raise CheckpointError(
            f"the adapter {found.path} changes lm_head, and in this base lm_head and embed_tokens are one matrix",
            hint="merge it with PEFT (merge_and_unload) and serve that",
        )
    both = [found.replaced.get(name) for name in _EMBEDDINGS]
    if "lm_head.weight" in found.matrices:
        found.untied = True
    elif both[1] is not None:
        found.untied = both[0] is None or not torch.equal(both[0], both[1])
        if not found.untied:
            del found.replaced["lm_head.weight"]
    else:
        found.untied = both[0] is not None and not together


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    file = path / WEIGHTS_FILE
    if not file.is_file():
        pickled = (path / "adapter_model.bin").is_file()
        hint = "save it anew with PEFT (safe_serialization=True): pickled weights are never read"
        raise CheckpointError(f"{file} is missing", hint=hint if pickled else "copy the adapter again")
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a mapping)
                yield key, opened.get_tensor(key).clone()
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error})", hint="copy the adapter again"
        ) from None


def _low_rank(
    config: ModelConfig, settings: Mapping[str, Any], module: str, parts: Mapping[str, Tensor], path: Path
) -> Iterator[tuple[str, LowRank]]:
    """One module's change, as changes of the network's own matrices, of which several may be joined in it."""
    missing = [part for part in _PARTS[:2] if part not in parts]
    if missing or (settings.get("use_dora") and _PARTS[2] not in parts):
        raise CheckpointError(f"{path}: {module} lacks {(*missing, _PARTS[2])[0][1:]}", hint="copy the adapter again")
    down, up, magnitude = (parts.get(part) for part in _PARTS)
    assert down is not None and up is not None, "checked above"
    alpha = _pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha") or 8, path)
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise CheckpointError(f"{path}: {module} has matrices of {shapes}, which are none of one rank of at least 1")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise CheckpointError(f"{path}: {module} has matrices of {down.dtype} and {up.dtype}, which are no floats")
    rank = down.shape[0]
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    names = _parameter(config, module, path)
    if len(names) == 1:
        yield names[0], LowRank(down, up, scale, None if magnitude is None else magnitude.flatten())
        return
    modules = [name.removesuffix(".weight") for name in names]
    layout = layout_of(config)
    ups = layout.part(config, module, modules, up)
    lengths = [None] * len(names) if magnitude is None else layout.part(config, module, modules, magnitude.flatten())
    for name, rows, length in zip(names, ups, lengths, strict=True):
        yield name, LowRank(down, rows, scale, length)


def _parameter(config: ModelConfig, module: str, path: Path) -> list[str]:
    """The names of the matrices that transformers' `module` holds."""
    if module == "lm_head":
        return ["lm_head.weight"]
    names = layout_of(config).ours(module)
    if layout_of(config).theirs(names[0]) == module and all(_MATRIX.fullmatch(name) for name in names):
        return [f"{name}.weight" for name in names]
    raise CheckpointError(
        f"the adapter {path} changes {module}, which the {config.family} family does not have",
        hint="name the base that it was trained on",
    )


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: float, path: Path) -> float:
    """PEFT's rule: the first pattern that the module's name ends with, after a dot or as a whole."""
    for pattern, value in (patterns or {}).items():
        try:
            found = regex.match(rf"(.*\.)?({pattern})$", module, timeout=_SECONDS_PER_PATTERN, concurrent=True)
            if found:
                return float(value)
        except (regex.error, TimeoutError, TypeError, ValueError) as error:
            problem = str(error) or "it takes too long"
            raise CheckpointError(
                f"{path / CONFIG_FILE}: alpha_pattern cannot be used at {str(pattern)[:100]!r}: {problem}",
                field="alpha_pattern",
            ) from None
    return float(default)


def _token_ids(settings: Mapping[str, Any], module: str, path: Path) -> list[int]:
    indices = settings.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        indices = next((value for name, value in indices.items() if module.endswith(name)), None)
    if not isinstance(indices, list) or not indices or not all(isinstance(index, int) for index in indices):
        raise CheckpointError(f"{path / CONFIG_FILE} does not say which rows of {module} were trained")
    return indices


# Writing


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """The adapters of `model` and its trained rows, under PEFT's names."""
    config, layout = model.config, layout_of(model.config)
    tensors: dict[str, Tensor] = {}
    for module, parts in _modules(model).items():
        downs, ups = [part.down.weight.detach() for part in parts], [part.up.weight.detach() for part in parts]
        magnitudes = [part.magnitude.detach() for part in parts if part.magnitude is not None]
        tensors[module + _PARTS[0]] = torch.cat(downs)
        if len(parts) == 1:
            tensors[module + _PARTS[1]] = ups[0]
        else:
            # Several matrices that are one in the file keep their own inner numbers: their blocks lie on the diagonal.
            blocks = torch.block_diag(*ups).split([len(up) for up in ups])  # type: ignore[no-untyped-call]
            tensors[module + _PARTS[1]] = layout.join(config, blocks)
        if magnitudes:
            tensors[module + _PARTS[2]] = layout.join(config, magnitudes) if len(parts) > 1 else magnitudes[0]
    rows = model.trained_rows
    if rows is not None:
        tensors[layout.theirs("embed_tokens") + _ROWS] = rows.embedding
        if rows.output is not None:
            tensors["lm_head" + _ROWS] = rows.output
    return {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def adapter_settings(model: Decoder, *, base: str, rank: int, alpha: float, dropout: float) -> dict[str, Any]:
    """`adapter_config.json` for what `adapter_tensors` gives; `base` is where the base checkpoint lies."""
    modules, layout = _modules(model), layout_of(model.config)
    targets = {_target(model, name): len(parts) for name, parts in modules.items()}
    # The scale stays alpha / rank where several matrices are stored as one of a larger rank.
    joined = {name: count for name, count in targets.items() if count > 1}
    output = [] if model.config.tie_embeddings else ["lm_head"]
    embeddings = [layout.theirs("embed_tokens").rpartition(".")[2], *output]
    rows = model.trained_rows
    token_ids = None if rows is None else rows.token_ids.tolist()
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_dora": any(part.magnitude is not None for parts in modules.values() for part in parts),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": layout.transposed,
        "init_lora_weights": True,
        "target_modules": sorted(targets),
        "modules_to_save": None,
        "rank_pattern": {name: count * rank for name, count in joined.items()},
        "alpha_pattern": {name: count * alpha for name, count in joined.items()},
        "trainable_token_indices": dict.fromkeys(embeddings, token_ids) if token_ids else None,
    }


def _target(model: Decoder, module: str) -> str:
    """What PEFT looks for at the end of a module's name."""
    inside = module.removeprefix(f"{layout_of(model.config).prefix}{layout_of(model.config).layers}.").partition(".")[2]
    last = inside.rpartition(".")[2]
    # One word is enough, where the same does not stand elsewhere in a layer, too.
    return last if last.endswith("_proj") and last != "c_proj" else inside


def _modules(model: Decoder) -> dict[str, list[Adapter]]:
    """The adapters of `model` by the module of transformers that holds their matrices, in the order it holds them."""
    layout = layout_of(model.config)
    modules: dict[str, list[Adapter]] = {}
    for name, linear in named_linears(model):
        if linear.adapter is not None:
            assert isinstance(linear.adapter, Adapter)
            modules.setdefault(layout.theirs(name), []).append(linear.adapter)
    return modules
