"""Guessing ahead changes when tokens come and never which: prompt lookup, draft networks, and how much they guess."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, GenerateJob, Token
from topkapi.model.cache import NetworkOutput
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.speculation import PAUSE, DraftLength, looked_up
from topkapi.model.errors import InvalidRequest, SettingsError
from topkapi.model.generation import generate
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.models import Models
from topkapi.service.settings import Settings

PROMPTS = [[3 + at, 9, 4, 9, 4 + at, 17] * (1 + at % 3) for at in range(10)]
STRATEGIES: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"temperature": 0.5, "top_k": 9}, {"mirostat": 2, "mirostat_tau": 2.0},
    {"repetition_penalty": 1.3}, {"n": 3}, {"n": 2, "best_of": 4}, {"guidance_scale": 1.5}, {"dola_layers": "low"},
    {"prompt_lookup": 6}, {"draft_tokens": 9}, {"draft_tokens": 0}, {"num_beams": 2},
]  # fmt: skip


def run(engine: Engine, wanted: list[dict[str, Any]]) -> tuple[list[list[tuple[int, int]]], list[Completed]]:
    """(index, token) of every job, given together, and how each ended."""
    found: list[list[Event]] = []
    for at, parameters in enumerate(wanted):
        events: list[Event] = []
        found.append(events)
        effective = resolve({"seed": at, "max_tokens": 30, "ignore_end_token": True, **parameters})
        engine.submit(GenerateJob(PROMPTS[at % len(PROMPTS)], effective), events.extend)
    while engine.step():
        pass
    ends = [events[-1] for events in found]
    assert all(isinstance(end, Completed) for end in ends), ends
    tokens = [
        sorted((e.index, at, e.token_id) for at, e in enumerate(events) if isinstance(e, Token)) for events in found
    ]
    return [[(index, token) for index, _, token in each] for each in tokens], ends  # type: ignore[return-value]


def engine(draft: Any = None, **settings: Any) -> Engine:
    return Engine(tiny_model(), name="tiny", draft=draft, **({"max_running": 5, "step_tokens": 24} | settings))


@pytest.mark.parametrize("draft", ["itself", "another", "shorter", "failing"])
def test_a_draft_network_changes_no_token(draft: str) -> None:
    plain, _ = run(engine(), [{k: v for k, v in each.items() if k != "draft_tokens"} for each in STRATEGIES])
    networks = {
        "itself": tiny_model,
        "another": lambda: tiny_model(seed=5, num_layers=1),
        "shorter": lambda: tiny_model(context_length=24),
        "failing": FailingNetwork,
    }
    drafting = engine(networks[draft]())
    drafted, ends = run(drafting, STRATEGIES)
    assert drafted == plain
    guessed, accepted = sum(end.guessed_tokens for end in ends), sum(end.accepted_tokens for end in ends)
    assert (drafting.counters.guessed_tokens, drafting.counters.accepted_tokens) == (guessed, accepted)
    if draft == "itself":
        # Only the last guesses of an answer, and those of lookups, can be wrong.
        assert accepted > 0.8 * guessed > 0
    elif draft == "failing":
        assert guessed == sum(end.guessed_tokens for end in ends[9:10])
    elif draft == "another":
        assert accepted < guessed


class FailingNetwork:
    """A draft network that always fails."""

    slots, capacity, deterministic, scanner = 5, 64, True, None

    def run(self, works: object) -> Any:
        raise MemoryError("injected")

    def copy(self, *arguments: int) -> None: ...


def test_a_perfect_draft_settles_several_tokens_per_pass() -> None:
    with_draft, without = engine(tiny_model()), engine()
    run(with_draft, [{"draft_tokens": 8}])
    run(without, [{}])
    assert without.counters.steps == 30
    assert with_draft.counters.steps < 10


def test_a_draft_that_is_never_right_is_hardly_asked() -> None:
    """After wrong guesses the length falls to one, and then a guess is made every `PAUSE` tokens."""

    class Wrong(FailingNetwork):
        asked = 0

        def run(self, works: Any) -> Any:
            self.asked += 1
            nothing = torch.zeros(0, 1)
            return [
                NetworkOutput(torch.eye(120)[119:].repeat(work.wanted, 1) * 1e6, nothing, nothing) for work in works
            ]

    network = Wrong()
    run(engine(network, max_running=5), [{"max_tokens": 58}])
    assert network.asked <= 4 + 2 + 1 + 58 // PAUSE + 1


def test_pace_grows_with_right_guesses_and_pauses_after_wrong_ones() -> None:
    draft = DraftLength(32)
    lengths = []
    for _ in range(5):
        lengths.append(draft.length(100))
        draft.learn(lengths[-1], lengths[-1])
    assert lengths == [4, 8, 16, 32, 32]
    draft.learn(32, 3)
    assert draft.length(100) == 3
    assert draft.length(2) == 2
    for guessed in (3, 1):
        draft.learn(guessed, 0)
    assert [draft.length(100) for _ in range(PAUSE + 1)] == [0] * PAUSE + [1]


def test_lookup_finds_what_followed_the_longest_match() -> None:
    assert looked_up(np.array([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3]), 2) == [9, 8]
    assert looked_up(np.array([4, 5, 6, 7, 5, 6]), 3) == [7, 5, 6]
    assert looked_up(np.array([1, 2, 3, 4]), 3) == []
    assert looked_up(np.array([7]), 3) == []


def test_draft_tokens_need_a_draft_checkpoint() -> None:
    with pytest.raises(InvalidRequest, match="needs a draft checkpoint") as caught:
        engine().submit(GenerateJob([1], resolve({"draft_tokens": 2})), list)
    assert caught.value.field == "draft_tokens"
    assert "--draft" in (caught.value.hint or "")


def test_served_with_a_draft_checkpoint(
    tiny_checkpoint: Callable[..., Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    checkpoint, draft = tiny_checkpoint("big", context=256), tiny_checkpoint("small", seed=0, context=256)
    with serve(checkpoint, draft=draft) as served:
        assert served.client.get("/models/big").json()["draft"] is True
        request = {"prompt": "The value of", "seed": 3, "max_tokens": 40, "ignore_end_token": True}
        drafted = served.answer("/generate", **request)
        plain = served.answer("/generate", **request, draft_tokens=0)
        assert drafted["outputs"] == plain["outputs"]
        assert drafted["usage"]["accepted_tokens"] > 20
        assert plain["usage"]["guessed_tokens"] == 0
        tokens = served.models.get().checkpoint.tokenizer.encode("The value of")
        alone = generate(
            served.models.get().checkpoint.model, tokens, {k: v for k, v in request.items() if k != "prompt"}
        )
        assert drafted["outputs"][0]["token_ids"] == alone.token_ids


def test_a_draft_with_another_vocabulary_is_refused(tiny_checkpoint: Callable[..., Path], english: str) -> None:
    first = tiny_checkpoint("first")
    loaded = load_checkpoint(first)
    other = Tokenizer.train([english[50_000:99_000]], loaded.tokenizer.vocab_size, ["<|end|>"])
    stranger = save_checkpoint(
        first.parent / "stranger", model=loaded.model, tokenizer=other, chat=None, generation={}, details={}
    )
    with pytest.raises(SettingsError, match="another vocabulary"):
        Models(Settings.read(draft=stranger)).load(str(first))
