"""What the tests that train share."""

from pathlib import Path
from typing import Any

import pytest


def blank(figure: Any, path: Path) -> None:
    """What stands for a picture that nobody looks at."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.fixture(autouse=True)
def reports_have_blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """To lay out and paint a report's three pictures takes longer than the tiny runs of most tests. They are drawn all
    the same, and painted in the tests of what is in a run's directory and of what lists and compares runs."""
    if request.node.path.name not in ("test_pretrain.py", "test_runs.py"):
        monkeypatch.setattr("topkapi.training.run.report.save", blank)
