"""What a visitor does with the chat, and what they see."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

OVER = "ended by itself|cut off"


def slowed(run: Callable) -> Callable:
    """As fast as a real network at most: a tiny one is through with 16,000 tokens before somebody can stop it."""

    def slow(*works: object) -> object:
        time.sleep(0.003)
        return run(*works)

    return slow


def send(page: Any, text: str) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")


def turns(page: Any) -> list[str]:
    """The texts of the turns, as they are read."""
    return [body.inner_text().strip() for body in page.query_selector_all("#conversation .turn:not(.answered) .body")]


def answers(page: Any) -> list[str]:
    return [body.inner_text().strip() for body in page.query_selector_all("#conversation [data-testid=answer]")]


def answered(page: Any, count: int, words: str = OVER) -> str:
    """Wait until there are so many answers and the last one has ended so; what is said of it."""
    page.wait_for_function(
        """([count, words]) => {
          const all = [...document.querySelectorAll('#conversation .turn:is(.assistant, .continuation)')];
          return all.length === count && all.at(-1).querySelector('.facts:not([hidden])')?.innerText.match(words);
        }""",
        arg=[count, words],
    )
    return page.locator("#conversation .facts").last.inner_text()


def writing(page: Any) -> None:
    """Wait until an answer is being written."""
    page.wait_for_function("document.querySelector('#status').innerText.match(/^Writing… [1-9]\\d* token/)")


def choose(page: Any, name: str) -> None:
    page.select_option("#checkpoint", name)
    page.wait_for_function("name => document.querySelector('#status').innerText.startsWith(name)", arg=name)


def set_parameter(page: Any, label: str, value: str) -> None:
    box = page.get_by_label(label, exact=True)
    box.fill(value)
    box.press("Tab")


def endless(page: Any) -> None:
    """Let answers go on to their limit: a network that draws at random ends where it likes."""
    page.locator("[data-parameter=ignore_end_token]").evaluate("box => box.checked || box.click()")


def refusal(page: Any) -> str:
    """What the error says that stands where it arose."""
    return page.wait_for_selector(".composer .studio-error[role=alert]").inner_text()


def kept(page: Any) -> list[dict]:
    """The conversations that the browser keeps."""
    return page.evaluate(
        """() => new Promise((done) => {
          const asked = indexedDB.open('topkapi');
          asked.onsuccess = () => {
            const all = asked.result.transaction('conversations').objectStore('conversations').getAll();
            all.onsuccess = () => { asked.result.close(); done(all.result); };
          };
        })"""
    )
