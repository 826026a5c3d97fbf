"""docs/extending.md, "A sampler", done as it says."""

from __future__ import annotations

from pathlib import Path

from tests.extending import followed, steps, told

PROGRAM = """
import json
import torch
from topkapi.model.decoding.documentation import page
from topkapi.model.decoding.parameters import DEFAULT_ORDER, resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.decoding.choosing import process
from topkapi.model.errors import InvalidRequest
from topkapi.service.api.native.schemas import GenerateRequest
from topkapi.service.commands.cli import build_parser

def left(**request):
    row = Row(resolve({"seed": 1, **request}), [1], 1)
    return (process(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), [row])[0] > -torch.inf).nonzero().flatten().tolist()

def refused(**request):
    try:
        resolve(request)
    except InvalidRequest as error:
        return error.message

(generate,) = (each.choices["generate"] for each in build_parser()._actions if each.dest == "==SUPPRESS==")
print(json.dumps({
    "after": DEFAULT_ORDER[DEFAULT_ORDER.index("p_less") - 1],
    "left": [left(), left(p_less=1), left(p_less=0.5), left(p_less=1, temperature=0)],
    "typed": resolve({"p_less": 0.5}).p_less,
    "refused": [refused(p_less=2), refused(p_less=1, mirostat=2), refused(p_less=1, num_beams=2)],
    "flag": generate.parse_args(["text", "--p-less", "0.5"]).p_less,
    "schema": GenerateRequest.model_json_schema()["properties"]["p_less"]["anyOf"][0],
    "documented": [line.split("|")[2].strip() for line in page().splitlines() if "`p_less`" in line],
}))
"""


def test_a_sampler_is_a_row_and_a_function(tmp_path: Path) -> None:
    assert len(steps("A sampler")) == 2
    found = told(followed("A sampler", tmp_path), PROGRAM)
    # The squares add up to 0.365.
    assert found == {
        "after": "top_a",
        "left": [[0, 1, 2, 3], [0], [0, 1], [0, 1, 2, 3]],
        "typed": 0.5,
        "refused": [
            "p_less must be at most 1, not 2",
            "mirostat decides itself where to cut and can't be combined with p_less",
            "p_less can't be combined with num_beams",
        ],
        "flag": 0.5,
        "schema": {"type": "number", "minimum": 0, "maximum": 1},
        "documented": ["number, from 0 to 1; 0 is off", "`p_less`"],
    }
