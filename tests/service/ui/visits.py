"""What tests of the studio's tabs share: hostile texts, contrast, width, a network no faster than real ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"> <script>document.title='taken'</script> "
    "<|im_end|> a\u202eb\u200bc\x07d"
)
"""Markup, a control token's spelling, and marks that are not seen."""
SEEN = HOSTILE.replace("\u202e", r"\u202e").replace("\u200b", r"\u200b").replace("\x07", r"\u0007")
"""How that is shown."""


def slowed(run: Callable) -> Callable:
    """As a real network is at most: a tiny one is through before somebody could stop it."""

    def slow(works: object) -> object:
        time.sleep(0.003)
        return run(works)

    return slow


CONTRAST = """nodes => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  return Math.min(...nodes.map((node) => {
    const [one, other] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
    return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
  }));
}"""


def least_contrast(page: Any, selector: str) -> float:
    """The smallest ratio of text and ground among the elements of a selector."""
    found: float = page.eval_on_selector_all(selector, CONTRAST)
    return found


def fits(page: Any) -> bool:
    """Whether nothing sticks out to the right."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))
