"""Every field of transformers' GenerationConfig is a default here, refused when loaded, or known to change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from topkapi.model.decoding.parameters import BY_NAME, from_generation_config
from topkapi.model.errors import CheckpointError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.storage.generation_config import HONOURED, NO_EFFECT, REFUSED


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("defaults") / "tiny"
    shutil.copytree(tiny_checkpoint("tiny"), copy)
    (copy / "topkapi.json").unlink()
    return copy


def loaded(checkpoint: Path, **defaults: Any) -> dict[str, Any]:
    (checkpoint / "generation_config.json").write_text(json.dumps(defaults))
    return load_checkpoint(checkpoint).generation


def test_every_field_is_in_one_table() -> None:
    """A field that a later transformers has belongs in one of them: look up what it does."""
    assert sorted([*HONOURED, *NO_EFFECT, *REFUSED]) == sorted(GenerationConfig().__dict__)


def test_what_is_honoured_reaches_the_parameters() -> None:
    values = {"bad_words_ids": [[1]], "suppress_tokens": [2], "do_sample": True}
    for field, parameter in HONOURED.items():
        if parameter in BY_NAME and field != "do_sample":
            assert parameter in from_generation_config({field: values.get(field, 3)}), field
    assert from_generation_config({"do_sample": False}) == {"temperature": 0.0}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name(name: str, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {name} = ") as refused:
        loaded(checkpoint, **{name: {"something": 1}})
    assert refused.value.field == name
    assert loaded(checkpoint, **{name: None}) == {name: None}
    for plain in REFUSED[name]:
        assert loaded(checkpoint, **{name: plain}) == {name: plain}


WRONG: dict[str, list[Any]] = {
    "bad_words_ids": ["", 3, [3], [["a"]], [[]], {}],
    "bos_token_id": ["1", 1.5, [1], True],
    "do_sample": ["yes", 1, []],
    "eos_token_id": ["2", 1.5, [1, "2"], [[1]], {"a": 1}],
    "pad_token_id": ["1", [1]],
    "suppress_tokens": ["a", 5, [1.5], {}],
}
NUMBERS = ["hot", [0.5], {}, True, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("name", [*HONOURED, "bos_token_id", "pad_token_id"])
def test_a_value_of_another_type_is_refused_by_file_and_field(name: str, checkpoint: Path) -> None:
    for value in WRONG.get(name, NUMBERS):
        with pytest.raises(CheckpointError) as refused:
            loaded(checkpoint, **{name: value})
        assert refused.value.field == name, value
        assert f"generation_config.json: {name} must" in refused.value.message


def test_what_changes_nothing_may_be_anything(checkpoint: Path) -> None:
    fields = {name: "anything" for name in NO_EFFECT if not name.endswith("_token_id")}
    assert loaded(checkpoint, **fields) == fields
