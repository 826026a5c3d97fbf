"""The chat checkpoint that comes with Topkapi answers the examples that it is shown with."""

import json
import re
from pathlib import Path

import pytest

import topkapi

CHECKPOINT = Path(__file__).resolve().parent.parent / "checkpoints" / "topkapi-chat"
RIGHT = {
    "hi": r"^(Hello|Hi)\b",
    "Who are you?": "Topkapi",
    "what is 7 + 5": r"\b12\b",
    "What is the capital of Japan?": "Tokyo",
    "Tell me a joke.": "outstanding|gummy|two tired",
    "what is 25 + 16": r"= 41\.$",
    "Write a short story about a lighthouse.": r"lighthouse[\s\S]*\.$",
    "Who wrote the Odyssey?": "not know|never learned",
}


def test_its_examples_are_answered_rightly() -> None:
    """Greedily and as it is served; that they are over 20 seeds was measured when they were chosen."""
    details = json.loads((CHECKPOINT / "topkapi.json").read_text("utf-8"))
    assert details["examples"] == list(RIGHT), "each has what makes its answer right"
    with topkapi.load(CHECKPOINT) as model:
        for asked, right in RIGHT.items():
            for settings in ({"temperature": 0}, {"seed": 1}):
                answer = model.chat(asked, max_tokens=100, **settings)
                assert re.search(right, answer), (asked, answer)


@pytest.mark.parametrize("page", ["README.md", "checkpoints/topkapi-chat/README.md"])
def test_the_examples_that_pages_show_are_among_them(page: str) -> None:
    text = (CHECKPOINT.parents[1] / page).read_text("utf-8")
    (paragraph,) = re.findall(r"Try (`.*?) which", text, re.DOTALL)
    shown = re.findall(r"`([^`]+)`", paragraph)
    assert len(shown) >= 3 and set(shown) <= set(RIGHT)
