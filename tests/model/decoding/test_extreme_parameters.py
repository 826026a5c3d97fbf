"""A number at the edge of its range may give an odd answer or a clear refusal, never a failed step."""

from __future__ import annotations

import math
import warnings

import pytest

from tests.tiny import tiny_model
from topkapi.model.decoding.parameters import BY_NAME, PARAMETERS
from topkapi.model.errors import InvalidRequest
from topkapi.model.generation import generate

NUMBERS = [parameter for parameter in PARAMETERS if parameter.kind in ("integer", "number")]


def edges(parameter) -> list[float]:
    if parameter.kind == "integer":
        low, high = int(parameter.minimum or 0), parameter.maximum
        # No integer type of a machine holds the last of these, nor float64 the one beyond.
        highest = [2**31, 2**63 - 1, 2**63, 10**300, 10**400] if high is None else [int(high)]
        return [low, low + 1, *highest]
    low = math.nextafter(parameter.above, math.inf) if parameter.above is not None else parameter.minimum
    if low is None:
        low = -1e308
    high = 1e308 if parameter.maximum is None else parameter.maximum
    return [low, math.nextafter(low, math.inf), 1e-40 if low <= 1e-40 <= high else low, high]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 1}, {"seed": 2, "temperature": 50.0}])
@pytest.mark.parametrize("parameter", NUMBERS, ids=lambda parameter: parameter.name)
def test_an_extreme_number_is_taken_or_refused(parameter, sampling) -> None:
    model = tiny_model()
    for value in edges(parameter):
        settings = sampling | {"max_tokens": 4, parameter.name: value}
        if parameter.needs is not None:
            settings |= {parameter.needs: BY_NAME[parameter.needs].maximum or 1}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                generated = generate(model, [1, 2, 3, 1, 2], settings)
            except InvalidRequest as refusal:
                assert refusal.message
            else:
                assert all(0 <= token_id < 120 for token_id in generated.token_ids)
