"""A judge: another model, behind any endpoint of OpenAI's shape, gives each answer 0 to 100."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from topkapi.model.errors import SettingsError
from topkapi.training.evaluation.tasks import Instruction

_PROMPT = """Grade an answer from 0 (useless) to 100 (perfect).

The instruction:
{instruction}
{reference}
The answer to grade:
{answer}

Reply with the grade alone, a whole number from 0 to 100."""
_GRADE = re.compile(r"(?<![\d.])(100|\d{1,2})(?![\d.]*\d)")
# Requests on their way at once.
_AT_ONCE = 4


class Judge:
    """Posts to `url`/chat/completions; the key, if any, is in the environment variable OPENAI_API_KEY."""

    def __init__(self, url: str, model: str, timeout_s: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise SettingsError(
                f"the judge {url!r} is not a URL", field="judge", hint="for example http://host:8000/v1"
            )
        self.url, self.model, self.timeout_s = url.rstrip("/") + "/chat/completions", model, timeout_s

    def scores(self, rows: Sequence[Instruction], records: Sequence[dict[str, Any]]) -> list[int | None]:
        """A grade for each answer; None where the reply holds none. Empty answers get 0 unasked.

        Raises `SettingsError` when the endpoint cannot be reached or refuses.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._score, rows, records))

    def _score(self, row: Instruction, record: dict[str, Any]) -> int | None:
        if not record["answer"]:
            return 0
        said = [f"{message['role']}: {message['content']}" for message in row.messages]
        instruction = row.messages[0]["content"] if len(said) == 1 else "\n".join(said)
        reference = "" if row.reference is None else f"\nA good answer:\n{row.reference}\n"
        prompt = _PROMPT.format(instruction=instruction, reference=reference, answer=record["answer"])
        return grade(self._ask(prompt))

    def _ask(self, prompt: str) -> str:
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                content = json.load(response)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = error.read(500).decode("utf-8", "replace").strip()
            raise SettingsError(
                f"the judge refused: {error.code} {said}", field="judge", hint="check --judge-model and OPENAI_API_KEY"
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SettingsError(
                f"the judge at {self.url} gave no answer: {error}",
                field="judge",
                hint="give the address that ends before /chat/completions, often in /v1",
            ) from None
        return content if isinstance(content, str) else ""


def grade(reply: str) -> int | None:
    """The first whole number from 0 to 100 in a reply."""
    found = _GRADE.search(reply)
    return int(found[1]) if found else None
