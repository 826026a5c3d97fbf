"""docs/families.md says what the code does."""

from __future__ import annotations

import pytest

from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.storage.families_page import PAGE, page
from topkapi.model.storage.gguf_names import ARCHITECTURES


def test_the_page_is_what_the_table_gives() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m topkapi.model.storage.families_page"
    for family, traits in FAMILIES.items():
        assert f"| `{family}` | {traits.models} |" in page() and traits.models


def test_every_architecture_is_read() -> None:
    assert set(ARCHITECTURES) == {traits.gguf for traits in FAMILIES.values()} - {""}


@pytest.mark.parametrize("family", ["mamba", "mixtral", "gemma3n", None, 3, ["llama"]])
def test_another_family_is_refused_with_those_that_are_supported(family: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_hugging_face({"model_type": family})
    assert caught.value.field == "model_type" and repr(family) in caught.value.message
    assert all(name in (caught.value.hint or "") for name in FAMILIES)
