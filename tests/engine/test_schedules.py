"""Whatever is submitted, cancelled, delayed or broken in whatever order: no token lost, none twice, nothing leaked.

The network is a fake that computes logits from a sequence's whole history and checks that the engine gave it exactly
that history, so a wrong slot, a stale prefix or a skipped token shows at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_config
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, Failed, Finished, GenerateJob, ScoreJob, Token
from topkapi.model.cache import NetworkOutput, Work
from topkapi.model.decoding.choosing import choose, drawing
from topkapi.model.decoding.parameters import DecodingParameters, resolve
from topkapi.model.decoding.scan import Ahead
from topkapi.model.decoding.stage import Row
from topkapi.model.errors import InvalidRequest
from topkapi.model.scoring import score
from topkapi.model.transformer import Decoder

VOCABULARY = 6
CONTEXT = 24
END = 0
with torch.device("meta"):
    META = Decoder(tiny_config(vocab_size=VOCABULARY, context_length=CONTEXT, end_token_ids=(END,)))


def history_logits(tokens: Sequence[int]) -> torch.Tensor:
    """Logits of the next token as a function of everything before it."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1_000_003
    return torch.tensor([(state * (index + 3) * 2_654_435_761 % 1000) / 250 for index in range(VOCABULARY)])


class HistoryNetwork:
    """A `engine.steps.Network` that knows what every slot should hold."""

    deterministic, scanner = True, None

    def __init__(self, slots: int, ahead: bool = True) -> None:
        self.slots, self.capacity, self.ahead = slots, CONTEXT, ahead
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.failures = 0
        self.largest_step = 0

    def run(self, works: Sequence[Work]) -> list[NetworkOutput]:
        if self.failures:
            self.failures -= 1
            raise MemoryError("injected")
        assert len({work.slot for work in works}) == len(works), "a slot is read once per step"
        self.largest_step = max(self.largest_step, sum(len(work.token_ids) for work in works))
        found = []
        for work in works:
            held = self.held[work.slot]
            assert work.token_ids
            assert work.start <= len(held), "tokens were skipped"
            del held[work.start :]
            held.extend(work.token_ids)
            assert len(held) <= self.capacity
            ends = [len(held) - back for back in reversed(range(max(work.wanted, work.states)))]
            rows = torch.stack([history_logits(held[:end]) for end in ends] or [torch.zeros(VOCABULARY)])
            early = torch.stack(
                [rows[len(rows) - work.wanted :].roll(1 + layer, -1) for layer in work.layers] or [rows]
            )
            found.append(NetworkOutput(rows[len(rows) - work.wanted :], rows[len(rows) - work.states :] - 2, early))
        return found

    def steps(self, works: Sequence[Work], rows: Sequence[Row], ahead: Ahead) -> list[tuple[float, list[int]]]:
        """Sometimes none, sometimes all that may be gone ahead, mostly some of it."""
        if not self.ahead or drawing(rows) is None:
            return []
        far, found = sum(work.start for work in works) % (ahead.most + 1), list[tuple[float, list[int]]]()
        rows, works = [replace(row, tokens=list(row.tokens)) for row in rows], list(works)
        while len(found) < far:
            choices = choose([output.logits[-1] for output in self.run(works)], rows)
            token_ids = [choice.token_id for choice in choices]
            found.append((0.001, token_ids))
            if ahead.interrupted[0] or any(token_ids[row] == token_id for row, token_id in ahead.ends):
                break
            for at, (row, token_id) in enumerate(zip(rows, token_ids, strict=True)):
                row.tokens.append(token_id)
                works[at] = replace(works[at], start=works[at].start + 1, token_ids=[token_id])
        return found

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        assert end <= len(self.held[source]), "copied what is not there"
        assert start <= len(self.held[target])
        assert self.held[target][:start] == self.held[source][:start], "copied onto something else"
        self.held[target] = self.held[source][:end]


def alone(prompt: list[int], parameters: DecodingParameters, sequence: int) -> tuple[list[int], str]:
    """What the job's sequence must be, computed without any engine."""
    tokens = list(prompt)
    limit = CONTEXT - len(prompt)
    if parameters.max_tokens is not None:
        limit = min(limit, parameters.max_tokens)
    row = Row(parameters, tokens, len(prompt), sequence, (END,))
    for _ in range(limit):
        tokens.append(choose(history_logits(tokens)[None], [row])[0].token_id)
        if tokens[-1] == END and not parameters.ignore_end_token:
            return tokens[len(prompt) :], "stop"
    return tokens[len(prompt) :], "length"


def undisturbed(job: GenerateJob) -> list[tuple[list[int], str]]:
    """What the outputs of a job that searches must be: an engine that has nothing else to do."""
    engine = Engine(META, name="fake", network=HistoryNetwork(8))
    events: list[Event] = []
    engine.submit(replace(job, deadline=None), events.extend)
    while engine.step():
        pass
    ends = {event.index: event.reason for event in events if isinstance(event, Finished)}
    return [
        ([event.token_id for event in events if isinstance(event, Token) and event.index == index], ends[index])
        for index in range(len(ends))
    ]


@dataclass
class Client:
    """Receives one job's events and remembers what was done to it."""

    job: Any
    broken: bool = False
    touched: bool = False
    events: list[Event] = field(default_factory=list)
    handle: Any = None

    def __call__(self, events: list[Event]) -> None:
        assert not (self.events and isinstance(self.events[-1], Completed | Failed)), "events after the end"
        self.events += events
        if self.broken:
            raise ConnectionError("the receiver went away")

    @property
    def over(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Completed | Failed)

    def check(self, faults: bool) -> None:
        ends = [event for event in self.events if isinstance(event, Completed | Failed)]
        assert len(ends) == 1, "a job ends exactly once"
        if isinstance(ends[0], Failed):
            assert faults, ends[0].error
            return
        finished = [event for event in self.events if isinstance(event, Finished)]
        if isinstance(self.job, ScoreJob):
            assert [event.index for event in finished] == [0]
            if finished[0].reason == "stop":
                self.check_scores(ends[0])
            return
        count = self.job.parameters.n
        assert sorted(event.index for event in finished) == list(range(count))
        plain = not any(map(self.job.parameters.asks_for, BESIDE))
        answers = [] if plain else undisturbed(self.job)
        for event in finished:
            got = [token.token_id for token in self.events if isinstance(token, Token) and token.index == event.index]
            expected, reason = (
                alone(self.job.prompt, self.job.parameters, event.index) if plain else answers[event.index]
            )
            if event.reason in ("cancelled", "deadline"):
                assert self.touched or self.broken
                # A search that ends early, or the best of what was begun, may answer what it would have dropped.
                assert got == expected[: len(got)] or not plain
            elif self.job.parameters.best_of and (self.touched or self.broken):
                # Complete, but the best only of what there was by then.
                every = replace(self.job.parameters, n=self.job.parameters.best_of, best_of=None)
                assert (got, event.reason) in undisturbed(replace(self.job, parameters=every))
            else:
                assert (got, event.reason) == (expected, reason)

    def check_scores(self, end: Completed) -> None:
        tokens = list(self.job.token_ids)
        assert end.scores is not None
        assert len(end.scores.logprobs) == len(tokens) - 1
        if len(tokens) <= CONTEXT and self.job.window is None:
            expected = [
                float(history_logits(tokens[:at]).double().log_softmax(-1)[tokens[at]]) for at in range(1, len(tokens))
            ]
            assert end.scores.logprobs == expected


PROMPTS = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=CONTEXT - 1) | st.integers(18, 23).map(
    lambda length: ([1, 2, 3, 4, 5] * 5)[:length]  # long shared prefixes
)
GENERATE = st.builds(
    lambda prompt, seed, greedy, n, most, ignore, priority, lookup: GenerateJob(
        prompt,
        resolve({
            "seed": seed, "temperature": 0.0 if greedy else 1.0, "n": n, "max_tokens": most, "ignore_end_token": ignore,
            "prompt_lookup": lookup,
        }),
        priority=priority,
    ),
    PROMPTS, st.integers(0, 9), st.booleans(), st.integers(1, 4), st.none() | st.integers(0, 16), st.booleans(),
    st.integers(0, 2), st.sampled_from([0, 1, 8]),
)  # fmt: skip
BESIDE = ("num_beams", "penalty_alpha", "guidance_scale", "dola_layers", "best_of")
SEARCHES = st.sampled_from([
    {"num_beams": 2, "n": 2, "temperature": 0}, {"num_beams": 3, "temperature": 0, "length_penalty": 0.5},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "n": 3, "temperature": 0},
    {"num_beams": 2, "early_stopping": True, "repetition_penalty": 1.3}, {"penalty_alpha": 0.4, "top_k": 3},
    {"best_of": 3, "n": 2},
    {"guidance_scale": 1.7, "negative_prompt": [4, 2]}, {"guidance_scale": 0.5, "n": 2}, {"dola_layers": "low"},
    {"dola_layers": [0, 1], "prompt_lookup": 4},
])  # fmt: skip
SEARCH = st.builds(
    lambda prompt, seed, wanted, most, ignore, priority: GenerateJob(
        prompt,
        resolve({"seed": seed, "max_tokens": most, "ignore_end_token": ignore, **wanted}),
        priority=priority,
        negative=wanted.get("negative_prompt", []),
    ),
    PROMPTS, st.integers(0, 9), SEARCHES, st.none() | st.integers(0, 12), st.booleans(), st.integers(0, 2),
)  # fmt: skip
SCORE = st.builds(
    lambda tokens, window, priority: ScoreJob(tokens, window=window, priority=priority),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60), st.none() | st.integers(2, 24),
    st.integers(0, 2),
)  # fmt: skip
OPERATIONS = st.lists(
    st.tuples(st.just("submit"), GENERATE | GENERATE | SEARCH | SCORE)
    | st.tuples(st.sampled_from(["step", "step", "step", "cancel", "deadline", "break", "fail"]), st.integers(0, 30)),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(1, 4), st.integers(4, 16))
def test_every_job_gets_its_own_tokens_and_ends_once(operations: list, slots: int, budget: int) -> None:
    check_schedule(operations, slots, budget)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(OPERATIONS, st.integers(1, 4), st.integers(4, 16))
def test_every_job_gets_its_own_tokens_and_ends_once_at_length(operations: list, slots: int, budget: int) -> None:
    check_schedule(operations, slots, budget)


def check_schedule(operations: list, slots: int, budget: int) -> None:
    network = HistoryNetwork(slots)
    engine = Engine(META, name="fake", network=network, step_tokens=budget)
    clients: list[Client] = []
    faults = False
    for name, argument in operations:
        if name == "submit":
            client = Client(argument)
            try:
                client.handle = engine.submit(argument, client)
            except InvalidRequest as error:
                assert "side by side" in error.message
                continue
            clients.append(client)
        elif name == "step":
            engine.step()
        elif name == "fail":
            network.failures, faults = argument % 3, True
        elif clients:
            client = clients[argument % len(clients)]
            if name == "cancel":
                client.handle.cancel()
                client.touched = True
            elif name == "break":
                client.broken = True
            else:
                object.__setattr__(client.handle.job, "deadline", time.monotonic() - 1)
                client.touched = True
    steps = 0
    while engine.step():
        steps += 1
        assert steps < 5000, "starvation: the engine never finishes"
    for client in clients:
        client.check(faults)
    assert network.largest_step <= max(budget, slots)
    scheduler = engine._steps.scheduler
    assert not scheduler.running
    assert not scheduler.waiting
    assert not scheduler._arrivals
    assert scheduler.pool.free == slots


def test_of_a_cancelled_job_what_is_complete_comes_first() -> None:
    """One slot: the first continuation has ended, the second has not begun."""
    engine = Engine(META, name="fake", network=HistoryNetwork(1), step_tokens=4)
    client = Client(GenerateJob([1], resolve({"seed": 0, "n": 2, "best_of": 3})))
    client.handle = engine.submit(client.job, client)
    for _ in range(3):
        engine.step()
    client.handle.cancel()
    client.touched = True
    while engine.step():
        pass
    client.check(faults=False)
    ends = {event.index: event.reason for event in client.events if isinstance(event, Finished)}
    assert ends == {0: "stop", 1: "cancelled"}
    assert [event.index for event in client.events if isinstance(event, Token)] == [0, 0, 0]


def test_cancel_frees_the_slot_within_one_step() -> None:
    network = HistoryNetwork(1)
    config = tiny_config(vocab_size=VOCABULARY, context_length=CONTEXT, end_token_ids=(END,))
    engine = Engine(Decoder(config), name="fake", network=network)
    first, second = (Client(GenerateJob([1], resolve({"seed": s, "ignore_end_token": True}))) for s in (1, 2))
    first.handle, second.handle = engine.submit(first.job, first), engine.submit(second.job, second)
    for _ in range(3):
        engine.step()
    assert engine.running == engine.waiting == 1
    first.handle.cancel()
    engine.step()
    assert first.over
    assert any(isinstance(event, Token) for event in second.events)


def test_a_long_prompt_delays_a_generating_sequence_by_at_most_one_budget() -> None:
    config = tiny_config(vocab_size=VOCABULARY, context_length=200, end_token_ids=(END,))
    network = HistoryNetwork(2)
    network.capacity = 200
    engine = Engine(Decoder(config), name="fake", network=network, step_tokens=16)
    short = Client(GenerateJob([1], resolve({"seed": 1, "ignore_end_token": True, "max_tokens": 20})))
    engine.submit(short.job, short)
    engine.step()
    engine.submit(GenerateJob([2] * 190, resolve({"seed": 1, "max_tokens": 1})), Client(None))
    for count in range(2, 12):
        engine.step()
        assert sum(isinstance(event, Token) for event in short.events) == count
    assert network.largest_step == 16


def test_higher_priority_preempts_and_the_preempted_loses_no_token() -> None:
    config = tiny_config(vocab_size=VOCABULARY, context_length=CONTEXT, end_token_ids=(END,))
    engine = Engine(Decoder(config), name="fake", network=HistoryNetwork(1, ahead=False))
    low = Client(GenerateJob([1, 2], resolve({"seed": 1, "ignore_end_token": True, "max_tokens": 8})))
    low.handle = engine.submit(low.job, low)
    for _ in range(4):
        engine.step()
    high = Client(GenerateJob([3], resolve({"seed": 2, "ignore_end_token": True, "max_tokens": 3}), priority=1))
    high.handle = engine.submit(high.job, high)
    for _ in range(3):
        engine.step()
    assert high.over
    assert not low.over
    while engine.step():
        pass
    low.check(faults=False)
    high.check(faults=False)


def test_shared_prefixes_are_read_once() -> None:
    config = tiny_config(vocab_size=VOCABULARY, context_length=200, end_token_ids=(END,))
    network = HistoryNetwork(4)
    network.capacity = 200
    engine = Engine(Decoder(config), name="fake", network=network)
    prompt = [1, 2, 3, 4, 5] * 20
    client = Client(GenerateJob(prompt, resolve({"seed": 1, "n": 4, "max_tokens": 5, "ignore_end_token": True})))
    engine.submit(client.job, client)
    while engine.step():
        pass
    assert engine.counters.read_tokens == 100 + 3 + 4 * 4  # the prompt once, its last token and the rest per sequence
    again = Client(GenerateJob([*prompt, 2, 2], resolve({"seed": 1, "max_tokens": 1})))
    engine.submit(again.job, again)
    while engine.step():
        pass
    assert isinstance(again.events[-1], Completed)
    assert again.events[-1].cached_tokens >= 100
    scored = Client(ScoreJob([*prompt, 3]))
    engine.submit(scored.job, scored)
    while engine.step():
        pass
    assert scored.events[-1].cached_tokens == 0, "every token of a scored text needs its own logits"


def test_scoring_through_the_engine_is_scoring() -> None:
    from tests.tiny import tiny_model
    from topkapi.engine.steps import DecoderNetwork

    model = tiny_model()
    engine = Engine(model, name="tiny", network=DecoderNetwork(model, 2), step_tokens=7)
    text = torch.randint(1, 120, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    client = Client(ScoreJob(text, window=40, stride=11, top=2))
    engine.submit(client.job, client)
    while engine.step():
        pass
    assert client.events[-1].scores == score(model, text, window=40, stride=11, top=2)


def test_what_was_read_before_a_preemption_is_not_gone_on_with_after_it() -> None:
    """The prompt is read before the longer negative one; then both lose their slots, and are read again."""
    for wanted in ({"guidance_scale": 1.7}, {"num_beams": 2, "temperature": 0}, {"penalty_alpha": 0.4, "top_k": 2}):
        for steps in range(1, 12):
            engine = Engine(META, name="fake", network=HistoryNetwork(2), step_tokens=4)
            parameters = resolve({"seed": 3, "max_tokens": 6, "ignore_end_token": True, **wanted})
            low = Client(
                GenerateJob([1, 2], parameters, negative=[4, 2, 5, 1, 3, 2, 4] * bool("guidance_scale" in wanted))
            )
            low.handle = engine.submit(low.job, low)
            for _ in range(steps):
                engine.step()
            for seed in (1, 2):
                high = GenerateJob([3] * 5, resolve({"seed": seed, "max_tokens": 3}), priority=1)
                engine.submit(high, Client(high))
            while engine.step():
                pass
            low.check(faults=False)
