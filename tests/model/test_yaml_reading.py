"""YAML of users and strangers: whatever is wrong with it, one kind of error says so, and no name is dropped."""

from __future__ import annotations

import pytest
import yaml

from tests.driver import ROOT
from topkapi.model.errors import SettingsError
from topkapi.model.yaml_reading import parse_yaml
from topkapi.service.settings_file import read_settings
from topkapi.training.evaluation.tasks import read_tasks
from topkapi.training.planning.sweeping import Range
from topkapi.training.recipes.arguments import read_yaml
from topkapi.training.recipes.recipe import PretrainRecipe, generation_defaults

# What PyYAML's own constructors answer with ValueError, KeyError or AttributeError.
NO_VALUES = ["2001-99-99", "2001-01-01 99:99:99", "!!int x", "!!float x", "!!timestamp x", "0x_", "!!bool x"]
NO_VALUES += ["9" * 5000]
WRONG = [*(f"port: {each}" for each in NO_VALUES), "port: 1\nport: 2", "a: {b: 1, b: 2}", "&a [*a", "? [a]\n: 1"]
WRONG += ["[" * 500_000, "[\n" * 2000]


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:24])
def test_whatever_is_wrong_with_it_is_one_kind_of_error(text, tmp_path) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    for read in (lambda path: read_settings(path, ["port"], "--config"), read_yaml, read_tasks):
        with pytest.raises(SettingsError, match=r"wrong\.yaml") as caught:
            read(file)
        assert len(caught.value.message) < 500


@pytest.mark.parametrize("value", ["2001-99-99", "!!int x", "["])
def test_values_on_the_command_line_too(value) -> None:
    with pytest.raises(ValueError, match="is not a decoding default"):
        generation_defaults([f"temperature={value}"])
    with pytest.raises(SettingsError, match="is none"):
        Range.of(f"batch_size=8,{value}", PretrainRecipe)


def test_a_strangers_file_does_not_refer() -> None:
    text = "a: &a [1]\nb: *a"
    assert parse_yaml(text) == {"a": [1], "b": [1]}
    with pytest.raises(yaml.YAMLError, match="references"):
        parse_yaml(text, references=False)


def test_what_is_right_is_read() -> None:
    assert parse_yaml("") is None
    assert parse_yaml("base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}")["own"] == {"a": 1, "b": 3}
    assert parse_yaml((ROOT / "training/recipes/instruction-1100.yaml").read_text())
