"""A judge: another model, behind any endpoint of OpenAI's shape, gives each answer 0 to 100."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
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
# Seconds between one request that failed for a while and the next, unless the server says how long.
_WAITS = (1.0, 4.0, 16.0)
_LONGEST_WAIT = 60.0
# A time-out, a conflict, too many requests; all server's errors pass as well.
_PASSING = (408, 409, 429)


class Failed(Exception):
    """The judge gave no answer; `lasting` where asking again would be no use."""

    def __init__(self, message: str, hint: str, *, lasting: bool, after: float | None = None) -> None:
        super().__init__(message)
        self.hint, self.lasting, self.after = hint, lasting, after


class Judge:
    """Posts to `url`/chat/completions; the key, if any, is in the environment variable OPENAI_API_KEY.

    What fails for a while (too many requests, a server's error, no connection) is asked again, after some seconds.
    `failures` says how often asking was given up, for what.
    """

    def __init__(self, url: str, model: str, timeout_s: float = 120.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise SettingsError(
                f"the judge {url!r} is not a URL", field="judge", hint="for example http://host:8000/v1"
            )
        self.url, self.model, self.timeout_s = url.rstrip("/") + "/chat/completions", model, timeout_s
        self.failures: Counter[str] = Counter()
        self._checked = False

    def check(self) -> None:
        """Ask a first, easy question, once, before hours are spent on answers.

        Raises `SettingsError` when the endpoint cannot be reached or refuses.
        """
        if self._checked:
            return
        try:
            self._ask(_PROMPT.format(instruction="What is 2 + 2?", reference="", answer="4"))
        except Failed as error:
            raise SettingsError(str(error), field="judge", hint=error.hint) from None
        self._checked = True

    def scores(self, rows: Sequence[Instruction], records: Sequence[dict[str, Any]]) -> list[int | None]:
        """A grade for each answer; None where the reply holds none or the judge failed. Empty answers get 0 unasked."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(self._score, rows, records))

    def _score(self, row: Instruction, record: dict[str, Any]) -> int | None:
        if not record["answer"]:
            return 0
        said = [f"{message['role']}: {message['content']}" for message in row.messages]
        instruction = row.messages[0]["content"] if len(said) == 1 else "\n".join(said)
        reference = "" if row.reference is None else f"\nA good answer:\n{row.reference}\n"
        prompt = _PROMPT.format(instruction=instruction, reference=reference, answer=record["answer"])
        try:
            return grade(self._ask(prompt))
        except Failed as error:
            self.failures[str(error)] += 1
            return None

    def _ask(self, prompt: str) -> str:
        for wait in _WAITS:
            try:
                return self._ask_once(prompt)
            except Failed as error:
                if error.lasting:
                    raise
                time.sleep(wait if error.after is None else min(error.after, _LONGEST_WAIT))
        return self._ask_once(prompt)

    def _ask_once(self, prompt: str) -> str:
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
            after = error.headers.get("Retry-After", "")
            raise Failed(
                f"the judge refused: {error.code} {said}", "check --judge-model and OPENAI_API_KEY",
                lasting=error.code not in _PASSING and error.code < 500,
                after=float(after) if after.isdecimal() else None,
            ) from None  # fmt: skip
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise Failed(
                f"the judge at {self.url} gave no answer: {error}",
                "give the address that ends before /chat/completions, often in /v1",
                lasting=not isinstance(error, OSError | HTTPException),
            ) from None
        return content if isinstance(content, str) else ""


def grade(reply: str) -> int | None:
    """The first whole number from 0 to 100 in a reply."""
    found = _GRADE.search(reply)
    return int(found[1]) if found else None
