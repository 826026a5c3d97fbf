"""What the dialects say of decoding parameters is what the table says, but for what their own systems do otherwise."""

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from topkapi.model.decoding.aliases import own_name
from topkapi.model.decoding.parameters import BY_NAME
from topkapi.service.api.anthropic.schemas import AnthropicRequest
from topkapi.service.api.http.describing import decoding
from topkapi.service.api.llama.schemas import LlamaRequest
from topkapi.service.api.sglang import SGLangParameters
from topkapi.service.api.tgi.schemas import TGIParameters

OTHERWISE: dict[type[BaseModel], dict[str, dict[str, float]]] = {
    AnthropicRequest: {},
    TGIParameters: {
        "max_new_tokens": {"minimum": 1},
        "temperature": {"exclusiveMinimum": 0},
        "top_k": {"minimum": 1},
        "top_p": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
        "typical_p": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    },
    SGLangParameters: {
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"minimum": -1},
        "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 2},
    },
    LlamaRequest: {
        "n_predict": {"minimum": -1},
        "max_tokens": {"minimum": -1},
        "seed": {"minimum": -1, "maximum": 2**53 - 1},
        "temperature": {},
        "top_k": {},
        "top_p": {"minimum": 0},
        "min_p": {"maximum": 1},
        "typical_p": {"minimum": 0},
        "top_n_sigma": {},
        "xtc_threshold": {"minimum": 0},
        "repeat_last_n": {"minimum": -1},
        "dry_base": {"minimum": 0, "maximum": 16},
        "dry_penalty_last_n": {"minimum": -1},
    },
}
BOUNDS = {"minimum": "minimum", "maximum": "maximum", "exclusiveMinimum": "above"}


@pytest.mark.parametrize("model", OTHERWISE, ids=lambda model: model.__name__)
def test_a_field_has_the_bounds_of_the_table_or_of_its_own_system(model: type[BaseModel]) -> None:
    properties = model.model_json_schema()["properties"]
    found, expected = {}, {}
    for name, told in properties.items():
        parameter = BY_NAME.get(own_name(name) or "")
        if parameter is not None and parameter.kind in ("integer", "number"):
            number = next(each for each in (*told.get("anyOf", ()), told) if each.get("type") in ("integer", "number"))
            found[name] = {each: number[each] for each in (*BOUNDS, "exclusiveMaximum") if each in number}
            table = {each: bound for each, of in BOUNDS.items() if (bound := getattr(parameter, of)) is not None}
            expected[name] = OTHERWISE[model].get(name, table)
    assert found == expected
    assert OTHERWISE[model].keys() <= found.keys()


@pytest.mark.parametrize(
    ("name", "own", "good", "bad"),
    [
        ("top_p", {}, [0, 1], [-0.1, 1.1]),
        ("top_p", {"gt": 0, "lt": 1}, [0.5], [0, 1]),
        ("top_p", {"le": None}, [0, 5], [-1]),
        ("repetition_penalty", {}, [0.1], [0]),
        ("repetition_penalty", {"ge": 0}, [0], [-1]),
        ("repeat_last_n", {"ge": -1}, [-1], [-2]),
    ],
)
def test_a_dialects_bound_takes_the_place_of_the_tables(
    name: str, own: dict[str, Any], good: list[float], bad: list[float]
) -> None:
    field = TypeAdapter(Annotated[float, decoding(name, **own)])
    for value in good:
        assert field.validate_python(value) == value
    for value in bad:
        with pytest.raises(ValidationError):
            field.validate_python(value)


def test_a_meaning_is_the_tables_or_its_own() -> None:
    properties = SGLangParameters.model_json_schema()["properties"]
    assert properties["min_p"]["description"] == BY_NAME["min_p"].meaning
    assert properties["top_k"]["description"] == "-1 keeps all."
