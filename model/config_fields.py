"""The fields of a `config.json`, read one by one.

Each field has a type and a range, and what would change the result without being computed here is refused by its name.
What a field means, and which of two wins, is what transformers 5 makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from topkapi.model.errors import CheckpointError

REQUIRED: Final = object()

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rotary positions, and the numbers that each takes."""

# What transformers reads from every family's configuration, with the values under which it changes nothing. An absent
# field changes nothing either.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention_chunk_size": (None,),
    "configuration_files": (None, []),
    "fusion_config": (None, {}),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_sharing_modes": (None, []),
    "mlp_layer_types": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None, {}),
    "transformers_weights": (None,),
}
GPT2_NAMES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other spellings of gpt2's fields, as transformers knows them."""


class Fields:
    """A `config.json` whose fields are asked for by name and type.

    Every method raises `CheckpointError` naming the field: for one that is absent and has no default, for a null where
    `null` does not say that it means the default, and for a value of another type or outside its range.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def whole(self, name: str, default: Any = REQUIRED, *, null: bool = False) -> int:
        """A whole number of at least 1."""
        value = self._value(name, default, null)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, "a whole number of at least 1")
        return value

    def number(
        self, name: str, default: Any = REQUIRED, *, null: bool = False, zero: bool = False, most: float = math.inf
    ) -> float:
        """A finite number above 0 (or 0, with `zero`) and at most `most`."""
        value = self._value(name, default, null)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        if not (value >= 0 if zero else value > 0) or value > min(most, 1e30):
            least = "of at least 0" if zero else "above 0"
            raise self._wrong(name, f"a number {least}" + ("" if most == math.inf else f" and at most {most:g}"))
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default, null=False)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; an absent one and null are empty."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, "an object or null")
        return dict(value or {})

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id or a list of them; an absent one and null are none."""
        value = self.values.get(name)
        found = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if any(isinstance(each, bool) or not isinstance(each, int) for each in found):
            raise self._wrong(name, "a token id, a list of token ids or null")
        return tuple(found)

    def refuse_unless_neutral(self, neutral: Mapping[str, tuple[object, ...]]) -> None:
        """Refuse what transformers computes and Topkapi does not: fields of every family, and these of one."""
        for name, allowed in {**NEUTRAL, **neutral}.items():
            if name in self.values and self.values[name] not in allowed:
                raise CheckpointError(
                    f"config.json asks for {name} = {self.values[name]!r:.200}, which is not supported",
                    field=name,
                    hint=_remedy(name, allowed),
                )

    def check_window(self, context: int) -> None:
        """Refuse a window of attention that is shorter than the context."""
        if self.values.get("sliding_window") is None:
            return
        window = self.whole("sliding_window")
        if window < context:
            raise CheckpointError(
                f"config.json: a sliding_window of {window} in a context of {context} positions is not supported",
                field="sliding_window",
                hint="models whose sliding_window is null, or no shorter than max_position_embeddings, are supported",
            )

    def check_layer_types(self, layers: int) -> None:
        """Refuse any layer that is not one of plain causal attention."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            raise self._wrong("layer_types", f"null or a list of {layers} names, one for each layer")
        other = next((kind for kind in kinds if kind not in ("full_attention", "attention")), None)
        if other is not None or None in kinds:
            raise CheckpointError(
                f"config.json: layer_types has {other!r:.100}, which is not supported",
                field="layer_types",
                hint="supported: 'full_attention' in every layer",
            )

    def _value(self, name: str, default: Any, null: bool) -> Any:
        value = self.values.get(name, default)
        if value is REQUIRED:
            raise CheckpointError(f"config.json lacks {self.where + name!r}", field=self.where + name)
        return default if value is None and null and default is not REQUIRED else value

    def _wrong(self, name: str, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"config.json: {self.where}{name} must be {wanted}, not {self.values.get(name)!r:.200}",
            field=self.where + name,
        )


def _remedy(name: str, allowed: tuple[object, ...]) -> str:
    if name == "quantization_config":
        return "give the weights as they were before quantising, or a GGUF file; --dtype int8 quantises them here"
    if name == "transformers_weights":
        return "name the file model.safetensors, and leave the field out"
    return f"supported: {', '.join(map(repr, allowed))}"


def read_rope(fields: Fields, context_length: int) -> tuple[float, dict[str, Any] | None]:
    """Rotary base and scaling, from transformers 5's `rope_parameters`, the older fields, or both where they agree.

    As in transformers 5, a `rope_scaling` that is not empty stands for the whole of `rope_parameters`, and what is
    beside them at the top holds for what is not inside. Raises `CheckpointError` for a kind of scaling that is not
    supported, for numbers that it does not take, and for fields that contradict each other.
    """
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    where = "rope_scaling" if older else "rope_parameters"
    chosen = older or newer
    kind = _rope_kind(chosen, where)
    inside = Fields(chosen, f"{where}.")
    theta = _from_either(fields, inside, "rope_theta", 10_000.0)
    for each in (inside, fields):
        if each.number("partial_rotary_factor", 1.0, null=True) != 1.0:
            raise CheckpointError(
                "config.json asks for a partial_rotary_factor other than 1, which is not supported",
                field="partial_rotary_factor",
            )
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS[kind]}
    foreign = [name for name, value in chosen.items() if name not in known and value is not None]
    if foreign:
        raise CheckpointError(
            f"config.json: {where} has {foreign[0]!r}, which rotary positions of the type {kind!r} do not take",
            field=f"{where}.{foreign[0]}",
            hint="give the rope_type that was meant, or leave the field out",
        )
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_FIELDS[kind]:
        if name == "original_max_position_embeddings":
            scaling[name] = _from_either(fields, inside, name, context_length)
        else:
            scaling[name] = inside.number(name)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise CheckpointError(
            f"config.json: {where}.high_freq_factor must be above low_freq_factor", field=f"{where}.high_freq_factor"
        )
    if older and newer:
        _check_agreement(newer, scaling | {"rope_theta": theta})
    return theta, None if kind == "default" else scaling


def _rope_kind(parameters: Mapping[str, Any], where: str) -> str:
    spellings = {name: parameters[name] for name in ("rope_type", "type") if name in parameters}
    kinds = list(spellings.values()) or ["default"]
    if any(kind not in list(ROPE_FIELDS) for kind in kinds):
        raise CheckpointError(
            f"config.json: {where} asks for rotary positions of the type {kinds[0]!r:.200}, which are not supported",
            field=where,
            hint=f"supported: {', '.join(ROPE_FIELDS)}",
        )
    if len(set(kinds)) > 1:
        raise CheckpointError(
            f"config.json: {where} has the rope_type {kinds[0]!r} and the type {kinds[1]!r}",
            field=f"{where}.type",
            hint="leave out the one that was not meant",
        )
    return str(kinds[0])


def _from_either(fields: Fields, inside: Fields, name: str, default: float) -> float:
    """A number that may stand among the rotary parameters or at the top of the file."""
    if name not in inside.values:
        return fields.number(name, default)
    value = inside.number(name)
    if fields.values.get(name) is not None and fields.number(name) != value:
        raise CheckpointError(
            f"config.json has {name} twice: {fields.values[name]!r}, and {value!r} in {inside.where[:-1]}",
            field=name,
            hint="leave out the one that was not meant",
        )
    return value


def _check_agreement(newer: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Refuse `rope_parameters` that say something else than the `rope_scaling` that stands for them."""
    for name, value in newer.items():
        kind = name in ("type", "rope_type")
        if value is None or (kind and value == "default") or name == "partial_rotary_factor":
            continue
        if result.get("rope_type" if kind else name) != value:
            raise CheckpointError(
                f"config.json: rope_parameters and rope_scaling contradict each other in {name}",
                field=f"rope_parameters.{name}",
                hint="leave out the one that was not meant; transformers 5 reads rope_scaling where both are there",
            )
