"""What a checkpoint thinks before it answers, kept apart from the answer, as it comes.

Families that reason write it between `<think>` and `</think>` at the beginning of an answer (Qwen 3, SmolLM3, and
DeepSeek-R1 with what was distilled from it). Some templates open the block in the prompt already; an answer may leave
it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from topkapi.model.conversation.tool_call_reader import Said
from topkapi.model.decoding.thinking import CLOSE, OPEN


@dataclass(frozen=True)
class Thought:
    """Text of the block of reasoning."""

    text: str


def reasons(template: str) -> bool:
    """Whether a chat template knows of reasoning: it takes the block out of earlier answers, or puts one there."""
    return CLOSE in template


def opened_by(prompt: str) -> bool:
    """Whether the end of a prompt has opened the block that the answer goes on with."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningReader:
    """Reads an answer piece by piece into what is thought and what is said.

    White space around either is no part of it. A block that is not closed when the answer ends (its most tokens, a stop
    text) is all thought. What stands after other text is no block. Read alike however the answer is cut.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = "thinking" if opened else "beginning"
        self._held = ""
        self._begun = False

    def feed(self, text: str) -> Iterator[Thought | Said]:
        """What a further piece of the answer adds."""
        self._held += text
        if self._state == "beginning":
            self._begin()
        if self._state == "thinking":
            yield from self._think()
        if self._state == "closed":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "saying"
        if self._state == "saying" and self._held:
            said, self._held = self._held, ""
            yield Said(said)

    def flush(self) -> Iterator[Thought | Said]:
        """What was held back, once the answer has ended."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            held = held.rstrip() if self._begun else held.strip()
            if held:
                yield Thought(held)
        elif self._state == "beginning" and held:
            yield Said(held)

    def _begin(self) -> None:
        rest = self._held.lstrip()
        if rest.startswith(OPEN):
            self._state, self._held = "thinking", rest[len(OPEN) :]
        elif not OPEN.startswith(rest):
            self._state = "saying"

    def _think(self) -> Iterator[Thought]:
        at = self._held.find(CLOSE)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(CLOSE) :]
            self._state = "closed"
        else:
            keep = next((n for n in range(min(len(CLOSE) - 1, len(self._held)), 0, -1)
                         if CLOSE.startswith(self._held[-n:])), 0)  # fmt: skip
            # White space before the end of the block goes with it, so it waits until more is thought.
            thought = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(thought) :]
        if not self._begun:
            thought = thought.lstrip()
        if thought:
            self._begun = True
            yield Thought(thought)
