"""Every field of PEFT's LoraConfig is honoured, refused by name, or known to change nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from topkapi.model.errors import CheckpointError
from topkapi.model.storage.adapter_fields import HONOURED, NO_EFFECT, REFUSED
from topkapi.model.storage.adapters import read_settings


@pytest.fixture(scope="module")
def config() -> Any:
    return pytest.importorskip("peft", reason="needs peft, the library whose format this is").LoraConfig


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | changes))
    return read_settings(tmp_path)


def test_every_field_is_in_one_table(config: Any) -> None:
    """A field that a later PEFT has belongs in one of them: look up what it does."""
    tables = [*HONOURED, *NO_EFFECT, *REFUSED]
    assert sorted(tables) == sorted({field.name for field in dataclasses.fields(config)})


def test_what_changes_nothing_is_what_peft_has_by_default(config: Any, tmp_path: Path) -> None:
    config(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert read_settings(tmp_path)["r"] == 4
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    for name, plain in REFUSED.items():
        assert stored.get(name) is None or stored[name] in plain, name


@pytest.mark.parametrize("name", [*REFUSED, "of_a_later_version"])
def test_what_changes_the_result_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"was made with {name} = ") as refused:
        settings(tmp_path, **{name: {"something": 1}})
    assert refused.value.field == name
    assert settings(tmp_path, **{name: None})


@pytest.mark.parametrize("name", HONOURED)
def test_a_value_of_another_type_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        settings(tmp_path, **{name: 1.5 if float not in HONOURED[name] else "much"})
    assert name in refused.value.message or name == "peft_type"


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_changes_nothing_may_be_anything(name: str, tmp_path: Path) -> None:
    assert settings(tmp_path, **{name: {"something": 1}})[name] == {"something": 1}
