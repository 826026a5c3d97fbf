"""Rotary positions as a `config.json` states them: bases, scaling, what part of a head is rotated, and in which layers.

What a field means, and which of two wins, is what transformers 5 makes of it (`modeling_rope_utils.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from topkapi.model.config_fields import REQUIRED, Fields
from topkapi.model.errors import CheckpointError
from topkapi.model.families import Family

ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "original_max_position_embeddings", "factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor", "attention_factor"),
}  # fmt: skip
"""The kinds of rotary positions, and what each takes."""
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_MAY_BE_ZERO = ("attention_factor", "mscale", "mscale_all_dim")
_LOCAL_THETA = "rope_local_base_freq"


def read_rope(fields: Fields, traits: Family, context_length: int, head_dim: int) -> dict[str, Any]:
    """Fields of `ModelConfig` from transformers 5's `rope_parameters`, the older fields, or both where they agree.

    As in transformers 5, a `rope_scaling` that is not empty stands for the whole of `rope_parameters`, and what is
    beside them at the top holds for what is not inside. Raises `CheckpointError` for a kind of scaling that is not
    supported, for numbers that it does not take, and for fields that contradict each other.
    """
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if traits.local_rope_theta is not None:
        return _read_two(fields, traits, older, newer, context_length, head_dim)
    where = "rope_scaling" if older else "rope_parameters"
    inside = Fields(older or newer, f"{where}.")
    theta = _from_either(fields, inside, "rope_theta", traits.rope_theta)
    part = _rotated_part(fields, inside, traits)
    scaling = _scaling(fields, inside, traits, context_length, head_dim, part)
    if older and newer:
        _check_agreement(newer, scaling | {"rope_theta": theta}, traits)
    return {
        "rope_theta": float(theta),
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "partial_rotary_factor": part,
    }


def _read_two(
    fields: Fields, traits: Family, older: dict[str, Any], newer: dict[str, Any], context_length: int, head_dim: int
) -> dict[str, Any]:
    """Positions of their own for layers with a window; `rope_scaling` is that of the others."""
    nested = Fields(newer, "rope_parameters.")
    _refuse_foreign(nested, {"full_attention", "sliding_attention"}, "which has those of each kind of layer")
    everywhere, local = nested.mapping("full_attention"), nested.mapping("sliding_attention")
    for name, value in older.items():
        kind = name in ("type", "rope_type")
        if everywhere.get("rope_type" if kind else name) not in (None, value, *(["default"] if kind else [])):
            raise _contradiction(f"rope_parameters.full_attention.{name}", name)
    found: dict[str, Any] = {}
    for chosen, where, name, theta_name, default in (
        ({**everywhere, **older}, "rope_scaling" if older else "rope_parameters.full_attention", "rope", "rope_theta",
         traits.rope_theta),
        (local, "rope_parameters.sliding_attention", "local_rope", _LOCAL_THETA, traits.local_rope_theta),
    ):  # fmt: skip
        inside = Fields(chosen, f"{where}.")
        theta = float(_from_either(fields, inside, "rope_theta", default, outside=theta_name))
        _rotated_part(fields, inside, traits)
        scaling = _scaling(fields, inside, traits, context_length, head_dim, 1.0)
        # transformers looks for it one level above, where it is not.
        if scaling.get("truncate") is False:
            raise CheckpointError(f"config.json: {where}.truncate must be true", field=f"{where}.truncate")
        if name == "local_rope" and scaling["rope_type"] == "longrope":
            # It would end the context as it does elsewhere, which a window makes no sense of.
            raise CheckpointError(
                "config.json asks for longrope in layers with a window, which is not computed",
                field=f"{where}.rope_type",
                hint="no published model has it: leave sliding_attention's rope_type at default",
            )
        if name == "rope":
            found |= {"rope_theta": theta, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}
        else:
            found["local_rope"] = scaling | {"rope_theta": theta}
    return found


def write_rope(traits: Family, values: Mapping[str, Any], context_length: int) -> dict[str, Any]:
    """The fields of `config.json` for these of `ModelConfig`, in both spellings.

    transformers >= 5 reads `rope_parameters`, everything older the other two.
    """
    theta, scaling = values["rope_theta"], _plain(values["rope_scaling"])
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    spelled = {traits.spelling.get("rope_theta", "rope_theta"): theta, "rope_scaling": scaling}
    if traits.partial_rotary is not None:
        part = values["partial_rotary_factor"]
        parameters["partial_rotary_factor"] = part
        spelled[traits.spelling.get("partial_rotary_factor", "partial_rotary_factor")] = part
    if "original_max_position_embeddings" in traits.absent:
        original = (scaling or {}).get("original_max_position_embeddings", context_length)
        spelled["original_max_position_embeddings"] = original
    if values["local_rope"] is None:
        return spelled | {"rope_parameters": parameters}
    local = _plain(values["local_rope"]) or {}
    nested = {"full_attention": parameters, "sliding_attention": local}
    return spelled | {_LOCAL_THETA: local["rope_theta"], "rope_parameters": nested}


def _plain(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not scaling:
        return None
    return {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}


def _scaling(
    fields: Fields, inside: Fields, traits: Family, context_length: int, head_dim: int, part: float
) -> dict[str, Any]:
    where = inside.where[:-1]
    kind = _rope_kind(inside.values, where, traits)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_FIELDS[kind]}
    _refuse_foreign(inside, known, f"which rotary positions of the type {kind!r} do not take")
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_FIELDS[kind]:
        value: Any
        if name == "original_max_position_embeddings":
            value = _from_either(fields, inside, name, context_length)
        elif name == "truncate":
            value = None if inside.given(name) is None else inside.flag(name, True)
        elif name.endswith(("short_factor", "long_factor")):
            value = inside.numbers(name, int(head_dim * part) // 2)
        elif name in _OPTIONAL or (name == "factor" and kind == "longrope"):
            value = None if inside.given(name) is None else inside.number(name, zero=name in _MAY_BE_ZERO)
        elif name == "factor" and kind == "yarn" and "factor" in inside.values and inside.given("factor") is None:
            value = context_length / scaling.get("original_max_position_embeddings", context_length)
        else:
            value = inside.number(name)
        if value is not None:
            scaling[name] = value
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise CheckpointError(
            f"config.json: {where}.high_freq_factor must be above low_freq_factor", field=f"{where}.high_freq_factor"
        )
    if kind == "longrope" and int(head_dim * part) % 2:
        raise CheckpointError(
            f"config.json: longrope needs an even number of rotated components, not {int(head_dim * part)}",
            field="partial_rotary_factor",
        )
    return scaling


def _rotated_part(fields: Fields, inside: Fields, traits: Family) -> float:
    """What part of a head is rotated. Refused where transformers rotates all of it in this family."""
    if traits.partial_rotary is None:
        for each in (inside, fields):
            if each.number("partial_rotary_factor", 1.0, null=True) != 1.0:
                raise CheckpointError(
                    "config.json asks for a partial_rotary_factor other than 1, which is not supported in this family",
                    field="partial_rotary_factor",
                )
        return 1.0
    name = "partial_rotary_factor"
    if inside.given(name) is None and fields.given(name) is None:
        return traits.partial_rotary
    if inside.given(name) is None:
        return fields.number(name, most=1.0)
    part = inside.number(name, most=1.0)
    _same_outside(fields, inside, name, name, part)
    return part


def _rope_kind(parameters: Mapping[str, Any], where: str, traits: Family) -> str:
    spellings = {name: parameters[name] for name in ("rope_type", "type") if name in parameters}
    given = list(spellings.values()) or ["default"]
    kinds = [traits.rope_kinds.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    known = traits.rope_types or tuple(ROPE_FIELDS)
    if any(kind not in known for kind in kinds):
        raise CheckpointError(
            f"config.json: {where} asks for rotary positions of the type {kinds[0]!r:.200}, which are not supported",
            field=where,
            hint=f"supported: {', '.join(known)}",
        )
    if len(set(kinds)) > 1:
        raise CheckpointError(
            f"config.json: {where} has the rope_type {kinds[0]!r} and the type {kinds[1]!r}",
            field=f"{where}.type",
            hint="leave out the one that was not meant",
        )
    return str(kinds[0])


def _refuse_foreign(inside: Fields, known: set[str], why: str) -> None:
    foreign = [name for name, value in inside.values.items() if name not in known and value is not None]
    if foreign:
        raise CheckpointError(
            f"config.json: {inside.where[:-1]} has {foreign[0]!r}, {why}"
            if why.startswith("which rotary")
            else f"config.json: {foreign[0]!r} does not belong into {inside.where[:-1]}, {why}",
            field=f"{inside.where}{foreign[0]}",
            hint="give the rope_type that was meant, or leave the field out",
        )


def _from_either(
    fields: Fields, inside: Fields, name: str, default: float | None, *, outside: str | None = None
) -> float:
    """A number that may stand among the rotary parameters or (as `outside`) at the top of the file."""
    outside = outside or name
    if name not in inside.values:
        return fields.number(outside, REQUIRED if default is None else default)
    value = inside.number(name)
    _same_outside(fields, inside, name, outside, value)
    return value


def _same_outside(fields: Fields, inside: Fields, name: str, outside: str, value: float) -> None:
    if fields.given(outside) is not None and fields.number(outside) != value:
        spelled = fields.spelled(outside)
        raise CheckpointError(
            f"config.json has {spelled} twice: {fields.given(outside)!r}, and {value!r} in {inside.where[:-1]}",
            field=spelled,
            hint="leave out the one that was not meant",
        )


def _check_agreement(newer: Mapping[str, Any], result: Mapping[str, Any], traits: Family) -> None:
    """Refuse `rope_parameters` that say something else than the `rope_scaling` that stands for them."""
    for name, value in newer.items():
        kind = name in ("type", "rope_type")
        if value is None or (kind and value == "default") or name == "partial_rotary_factor":
            continue
        value = traits.rope_kinds.get(value, value) if kind and isinstance(value, str) else value
        value = tuple(value) if isinstance(value, list) else value
        if result.get("rope_type" if kind else name) != value:
            raise _contradiction(f"rope_parameters.{name}", name)


def _contradiction(field: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: rope_parameters and rope_scaling contradict each other in {name}",
        field=field,
        hint="leave out the one that was not meant; transformers 5 reads rope_scaling where both are there",
    )
