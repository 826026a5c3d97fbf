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
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    # Two names of GELU's tanh approximation, and a third way to write it.
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu_squared",
}
"""transformers' names of the nonlinearities that are computed, with `ModelConfig`'s."""


# Far above every published network; what is beyond is a damaged or a hostile file, and building it would not end.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_layers": 2**12,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "context_length": 2**31,
}


def check_size(name: str, value: object) -> None:
    """Refuse a size of a network that is no whole number, below one, or larger than any network has."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{name} must be a whole number of at least 1, not {value!r}", field=name)
    if value > LARGEST[name]:
        raise CheckpointError(f"{name} must be at most {LARGEST[name]}, not {str(value)[:20]}", field=name)


class Fields:
    """A `config.json` whose fields are asked for by name and type.

    Every method raises `CheckpointError` naming the field: for one that is absent and has no default, for a null where
    `null` does not say that it means the default, and for a value of another type or outside its range.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "", spelling: Mapping[str, str] | None = None) -> None:
        self.values = values
        self.where = where
        self._spelling = spelling or {}

    def spelled(self, name: str) -> str:
        """What the file calls the field."""
        return self._spelling.get(name, name)

    def given(self, name: str) -> Any:
        """The value as the file has it, None where it has none."""
        return self.values.get(self.spelled(name))

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
        value = self.given(name)
        if value is not None and not isinstance(value, Mapping):
            raise self._wrong(name, "an object or null")
        return dict(value or {})

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""
        value = self._value(name, REQUIRED, null=False)
        plain = isinstance(value, list | tuple) and len(value) == count
        if not plain or any(isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each <= 1e30
                            for each in value):  # fmt: skip
            raise self._wrong(name, f"a list of {count} numbers above 0")
        return tuple(value)

    def activation(self, name: str, default: str) -> str:
        """A nonlinearity, as `ModelConfig` calls it, by one of transformers' names for it."""
        value = self._value(name, None, null=False)
        found = default if value is None and self.spelled(name) not in self.values else ACTIVATIONS.get(str(value))
        if found is None or not isinstance(value, str | None):
            raise CheckpointError(
                f"config.json asks for {self.spelled(name)} = {value!r:.200}, which is not supported",
                field=self.spelled(name),
                hint=f"supported: {', '.join(ACTIVATIONS)}",
            )
        return found

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

    def layer_types(self, layers: int, known: tuple[str, ...] = ("full_attention",)) -> list[str] | None:
        """What each layer attends to, None where nothing is said. Refuses what is not `known`."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            raise self._wrong("layer_types", f"null or a list of {layers} names, one for each layer")
        # An older name.
        kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]
        other = [kind for kind in kinds if kind not in known]
        if other:
            raise CheckpointError(
                f"config.json: layer_types has {other[0]!r:.100}, which is not supported",
                field="layer_types",
                hint=f"supported here: {', '.join(map(repr, known))} in every layer",
            )
        return kinds

    def _value(self, name: str, default: Any, null: bool) -> Any:
        value = self.values.get(self.spelled(name), default)
        if value is REQUIRED:
            name = self.where + self.spelled(name)
            raise CheckpointError(f"config.json lacks {name!r}", field=name)
        return default if value is None and null and default is not REQUIRED else value

    def _wrong(self, name: str, wanted: str) -> CheckpointError:
        value, name = self.given(name), self.where + self.spelled(name)
        return CheckpointError(f"config.json: {name} must be {wanted}, not {value!r:.200}", field=name)


def _remedy(name: str, allowed: tuple[object, ...]) -> str:
    if name == "quantization_config":
        return "give the weights as they were before quantising, or a GGUF file; --dtype int8 quantises them here"
    if name == "transformers_weights":
        return "name the file model.safetensors, and leave the field out"
    return f"supported: {', '.join(map(repr, allowed))}"
