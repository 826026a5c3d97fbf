"""Beam, diverse beam and contrastive search, guidance, DoLa and best_of against transformers and the papers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.tiny import tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, Failed, Finished, GenerateJob, Token
from topkapi.engine.steps import DecoderNetwork
from topkapi.model.config import ModelConfig
from topkapi.model.decoding.choosing import choose, process
from topkapi.model.decoding.contrast import contrasted, exit_layers
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.errors import InvalidRequest
from topkapi.model.generation import generate
from topkapi.model.storage.tensors import from_hugging_face
from topkapi.model.transformer import Decoder

PROMPT = [5, 17, 33, 8, 17, 33]
END = 1


@pytest.fixture(scope="module")
def reference() -> tuple[transformers.PreTrainedModel, Decoder]:
    """The same random weights in transformers and here."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=48, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, bos_token_id=0, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    own = Decoder(ModelConfig.from_hugging_face(config.to_dict()))
    own.load_state_dict(dict(from_hugging_face(own.config, iter(model.state_dict().items()))))
    return model, own.eval().requires_grad_(False)


def run(engine: Engine, *jobs: GenerateJob) -> list[list[Event]]:
    """The events of jobs that are given to an engine together."""
    found: list[list[Event]] = [[] for _ in jobs]
    for job, events in zip(jobs, found, strict=True):
        engine.submit(job, events.extend)
    while engine.step():
        pass
    return found


def job(prompt: Sequence[int], negative: Sequence[int] = (), **wanted: Any) -> GenerateJob:
    parameters = resolve({"seed": 1, **wanted})
    return GenerateJob(list(prompt), parameters, negative=list(negative))


def answers(events: list[Event]) -> list[list[int]]:
    """The token ids of every output."""
    assert isinstance(events[-1], Completed), events[-1]
    count = sum(isinstance(event, Finished) for event in events)
    return [[e.token_id for e in events if isinstance(e, Token) and e.index == index] for index in range(count)]


def scores(events: list[Event]) -> list[float]:
    return [event.score for event in events if isinstance(event, Finished) and event.score is not None]


def engine_of(model: Decoder, slots: int = 16, **settings: Any) -> Engine:
    return Engine(model, name="search", max_running=slots, **settings)


@pytest.mark.parametrize(
    "wanted",
    [
        {"num_beams": 2},
        {"num_beams": 4, "n": 4},
        {"num_beams": 5, "n": 3, "length_penalty": 0.0},
        {"num_beams": 3, "n": 2, "length_penalty": -1.5},
        {"num_beams": 4, "n": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "n": 2, "min_tokens": 6},
        {"num_beams": 4, "n": 4, "no_repeat_ngram_size": 2},
    ],
)
def test_beam_search_is_transformers(reference, wanted: dict[str, Any]) -> None:
    theirs, ours = reference
    for start in range(6):
        prompt = [(token + 7 * start) % 58 + 2 for token in PROMPT]
        renamed = {"n": "num_return_sequences", "min_tokens": "min_new_tokens"}
        generated = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, output_scores=True,
            return_dict_in_generate=True, pad_token_id=END,
            **{renamed.get(name, name): value for name, value in wanted.items()},
        )  # fmt: skip
        expected = [row[: [*row, END].index(END) + 1] for row in generated.sequences[:, len(prompt) :].tolist()]
        (events,) = run(engine_of(ours), job(prompt, temperature=0, max_tokens=12, **wanted))
        assert answers(events) == expected
        assert scores(events) == pytest.approx(generated.sequences_scores.tolist(), rel=1e-4)


def test_beam_search_with_room_for_everything_finds_the_likeliest() -> None:
    """With as many beams as there are continuations nothing is ever dropped: the exact answer by enumeration."""
    model = tiny_model(vocab_size=4, scale=8.0)
    (events,) = run(
        engine_of(model, slots=64),
        job([2, 3], temperature=0, num_beams=64, n=8, max_tokens=3, ignore_end_token=True, length_penalty=0),
    )
    totals = {}
    for way in itertools.product(range(4), repeat=3):
        tokens = torch.tensor([[2, 3, *way]])
        with torch.no_grad():
            logprobs = model(tokens, torch.arange(5)[None]).double().log_softmax(-1)[0]
        totals[way] = sum(float(logprobs[1 + at, token]) for at, token in enumerate(way))
    best = sorted(totals, key=totals.__getitem__, reverse=True)[:8]
    assert [tuple(answer) for answer in answers(events)] == best
    assert scores(events) == pytest.approx([totals[way] for way in best], rel=1e-5)


def diverse(
    logprobs: Callable[[list[int]], Tensor], prompt: list[int], groups: int, width: int, penalty: float, length: int
) -> list[list[tuple[float, list[int]]]]:
    """Vijayakumar et al. 2016, algorithm 1, without an end token: the beams of each group with their scores."""
    beams: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(groups)]
    for _ in range(length):
        taken: Counter[int] = Counter()
        for group in range(groups):
            ways = []
            for score, tokens in beams[group]:
                for token, gain in enumerate(logprobs([*prompt, *tokens]).tolist()):
                    ways.append((score + gain - penalty * taken[token], [*tokens, token]))
            beams[group] = sorted(ways, key=lambda way: -way[0])[:width]
            taken.update(tokens[-1] for _, tokens in beams[group])
    return beams


@pytest.mark.parametrize(("groups", "width", "penalty"), [(2, 2, 1.5), (3, 1, 4.0), (2, 3, 0.25), (4, 1, 0.0)])
def test_diverse_beam_search_is_the_papers(groups: int, width: int, penalty: float) -> None:
    model = tiny_model(vocab_size=30)

    def logprobs(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None])
        return logits[0, -1].double().log_softmax(-1)

    expected = [beam for group in diverse(logprobs, [3, 4, 5], groups, width, penalty, 6) for beam in group]
    expected.sort(key=lambda beam: -beam[0])
    wanted = {"diversity_penalty": penalty} if penalty else {}
    (events,) = run(engine_of(model), job(
        [3, 4, 5], temperature=0, num_beams=groups * width, num_beam_groups=groups, n=groups * width, max_tokens=6,
        ignore_end_token=True, length_penalty=0, **wanted,
    ))  # fmt: skip
    assert sorted(answers(events)) == sorted(tokens for _, tokens in expected)
    assert scores(events) == pytest.approx([score for score, _ in expected], rel=1e-5)


@pytest.mark.parametrize(("alpha", "top_k"), [(0.6, 4), (0.1, 8), (0.9, 3), (0.4, 5)])
def test_contrastive_search_is_the_papers(reference, alpha: float, top_k: int) -> None:
    theirs, ours = reference
    tokens = list(PROMPT)
    for _ in range(10):
        with torch.no_grad():
            before = theirs(torch.tensor([tokens]), output_hidden_states=True)
            probabilities = before.logits[0, -1].softmax(-1)
            best, candidates = probabilities.topk(top_k)
            scored = []
            for probability, candidate in zip(best.tolist(), candidates.tolist(), strict=True):
                after = theirs(torch.tensor([[*tokens, candidate]]), output_hidden_states=True).hidden_states[-1][0]
                likeness = torch.cosine_similarity(after[-1], after[:-1], dim=-1).max().item()
                scored.append(((1 - alpha) * probability - alpha * likeness, candidate))
        tokens.append(max(scored)[1])
    (events,) = run(engine_of(ours, step_tokens=5), job(
        PROMPT, penalty_alpha=alpha, top_k=top_k, max_tokens=10, ignore_end_token=True, n=2
    ))  # fmt: skip
    assert answers(events) == [tokens[len(PROMPT) :]] * 2


@pytest.mark.parametrize(("scale", "negative"), [(1.5, [9, 9, 12, 40, 7]), (3.0, [33]), (2.0, []), (0.5, [4, 5])])
def test_guidance_is_transformers(reference, scale: float, negative: list[int]) -> None:
    theirs, ours = reference
    given = {"negative_prompt_ids": torch.tensor([negative])} if negative else {}
    expected = theirs.generate(
        torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12, guidance_scale=scale, pad_token_id=0,
        eos_token_id=None, **given,
    )[0, len(PROMPT) :].tolist()  # fmt: skip
    wanted = job(PROMPT, negative, temperature=0, max_tokens=12, guidance_scale=scale, ignore_end_token=True)
    (events,) = run(engine_of(ours, step_tokens=3), wanted)
    assert answers(events) == [expected]


def test_guidance_works_on_what_is_sampled_and_keeps_constraints(reference) -> None:
    _, ours = reference
    wanted = job(PROMPT, [9, 9], guidance_scale=2.5, max_tokens=8, banned_token_ids=[3, 4], ignore_end_token=True, n=3)
    (events,) = run(engine_of(ours), wanted)
    assert len({tuple(answer) for answer in answers(events)}) == 3
    for index, answer in enumerate(answers(events)):
        tokens, negative = list(PROMPT), [9, 9]
        for token_id in answer:
            logits = [ours(torch.tensor([t]), torch.arange(len(t))[None])[0, -1] for t in (tokens, negative)]
            row = Row(wanted.parameters, tokens, len(PROMPT), index)
            row.guide = logits[1]
            assert process(logits[0][None], [row])[0, [3, 4]].tolist() == [-math.inf] * 2
            assert choose(logits[0][None], [row])[0].token_id == token_id
            tokens.append(token_id)
            negative.append(token_id)


@pytest.mark.parametrize("layers", ["low", "high", [0, 3], [5]])
def test_dola_is_the_papers(reference, layers: str | list[int]) -> None:
    """Early exits by the output matrix alone; divergence, contrast and the plausible tokens in plain arithmetic."""
    theirs, ours = reference
    numbers = {"low": [0, 2], "high": [3, 5]}.get(str(layers), layers)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(10):
            output = theirs(torch.tensor([tokens]), output_hidden_states=True)
            last = output.logits[0, -1].double().softmax(-1)
            found = []
            for number in numbers:
                early = theirs.lm_head(output.hidden_states[number][0, -1]).double().softmax(-1)
                mean = (last + early) / 2
                divergence = ((last * (last / mean).log()).sum() + (early * (early / mean).log()).sum()) / 2
                found.append((float(divergence), early))
            early = max(found, key=lambda each: each[0])[1]
            contrast = (last.log() - early.log()).masked_fill(last < 0.1 * last.max(), -math.inf)
            tokens.append(int(contrast.argmax()))
    wanted = job(PROMPT, temperature=0, dola_layers=layers, max_tokens=10, ignore_end_token=True, prompt_lookup=4)
    (events,) = run(engine_of(ours, step_tokens=4), wanted)
    assert answers(events) == [tokens[len(PROMPT) :]]


def test_dola_layers_of_large_and_tied_networks() -> None:
    assert exit_layers("low", 32, tied=False) == tuple(range(0, 16, 2))
    assert exit_layers("high", 32, tied=True) == tuple(range(16, 32, 2))
    assert exit_layers("low", 32, tied=True) == tuple(range(2, 16, 2))
    assert exit_layers("low", 80, tied=False) == tuple(range(0, 20, 2))
    assert exit_layers("high", 80, tied=False) == tuple(range(60, 80, 2))
    assert exit_layers("low", 2, tied=True) == (1,)
    with pytest.raises(InvalidRequest, match="layer 6"):
        exit_layers([0, 6], 6, tied=False)
    late = torch.tensor([2.0, 1.0, -5.0, 1.5])
    assert contrasted(late, late[None]).tolist() == [0.0, 0.0, -math.inf, 0.0]


def test_best_of_answers_with_the_likeliest_per_token(reference) -> None:
    _, ours = reference
    shared = {"max_tokens": 9, "temperature": 1.5}
    engine = engine_of(ours, slots=4)
    (all_events,) = run(engine, job(PROMPT, n=7, logprobs=0, **shared))
    logprobs = [[e.raw_logprob for e in all_events if isinstance(e, Token) and e.index == index] for index in range(7)]
    order = sorted(range(7), key=lambda index: -sum(logprobs[index]) / len(logprobs[index]))
    (events,) = run(engine, job(PROMPT, n=3, best_of=7, **shared))
    everything = answers(all_events)
    assert answers(events) == [everything[index] for index in order[:3]]
    assert all(event.raw_logprob is None for event in events if isinstance(event, Token))
    (explained,) = run(engine, job(PROMPT, n=3, best_of=7, logprobs=2, **shared))
    best = [e for e in explained if isinstance(e, Token) and e.index == 0]
    assert [event.raw_logprob for event in best] == logprobs[order[0]]
    assert all(len(event.top) == 2 for event in best)


def test_searches_report_log_probabilities_and_traces(reference) -> None:
    _, ours = reference
    shared = {"temperature": 0, "max_tokens": 8, "logprobs": 3, "trace": True, "ignore_end_token": True}
    for wanted in ({"num_beams": 3, "n": 2}, {"penalty_alpha": 0.5, "top_k": 4}):
        (events,) = run(engine_of(ours), job(PROMPT, **shared, **wanted))
        tokens = list(PROMPT)
        for event in events:
            if isinstance(event, Token) and event.index == 0:
                logprobs = ours(torch.tensor([tokens]), torch.arange(len(tokens))[None])[0, -1].double().log_softmax(-1)
                assert event.raw_logprob == pytest.approx(float(logprobs[event.token_id]), abs=1e-4)
                assert event.trace is not None
                assert event.trace.how == "searched"
                assert len(event.top) == 3
                tokens.append(event.token_id)
        if "num_beams" in wanted:
            first = [e.logprob for e in events if isinstance(e, Token) and e.index == 0]
            assert scores(events)[0] == pytest.approx(sum(first) / 8, rel=1e-6)


def test_common_beginnings_are_streamed_before_the_end(reference) -> None:
    """What is handed out early is never taken back: it is what the finished answer begins with."""
    _, ours = reference
    engine = engine_of(ours)
    arrivals: list[list[Event]] = []
    engine.submit(job(PROMPT, temperature=0, num_beams=3, max_tokens=40, ignore_end_token=True), arrivals.append)
    while engine.step():
        pass
    assert len(arrivals) > 5, "tokens came in several deliveries"
    alone = answers([event for events in arrivals for event in events])
    assert len(alone[0]) == 40


class StopAfter:
    """A stop check that counts."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self, token_id: int) -> str | None:
        self.left -= 1
        return "enough" if self.left == 0 else None

    def copy(self) -> StopAfter:
        return StopAfter(self.left)


@pytest.mark.parametrize("wanted", [{"num_beams": 3, "n": 2}, {"penalty_alpha": 0.5, "top_k": 3}])
def test_stop_checks_follow_every_branch(reference, wanted: dict[str, Any]) -> None:
    _, ours = reference
    stopped = replace(
        job(PROMPT, temperature=0, max_tokens=30, ignore_end_token=True, **wanted), stop_check=lambda _: StopAfter(4)
    )
    (events,) = run(engine_of(ours), stopped)
    assert [len(answer) for answer in answers(events)] == [4] * wanted.get("n", 1)
    assert {(e.reason, e.stop_reason) for e in events if isinstance(e, Finished)} == {("stop", "enough")}


def test_cancelling_a_search_gives_what_there_is_and_frees_every_slot(reference) -> None:
    _, ours = reference
    engine = engine_of(ours, slots=8)
    for wanted in ({"num_beams": 8, "n": 2}, {"penalty_alpha": 0.5, "top_k": 8}, {"guidance_scale": 2.0}):
        events: list[Event] = []
        handle = engine.submit(
            job(PROMPT, temperature=0, max_tokens=80, ignore_end_token=True, **wanted), events.extend
        )
        for _ in range(6):
            engine.step()
        handle.cancel()
        assert engine.step() is False
        reasons = [event.reason for event in events if isinstance(event, Finished)]
        assert reasons == ["cancelled"] * wanted.get("n", 1)
        assert all(0 < len(answer) <= 6 for answer in answers(events))


def test_what_needs_more_places_than_there_are_is_refused(reference) -> None:
    _, ours = reference
    engine = engine_of(ours, slots=2)
    for wanted, field in (
        ({"num_beams": 3}, "num_beams"),
        ({"penalty_alpha": 0.5, "top_k": 3}, "top_k"),
        ({"dola_layers": [6]}, "dola_layers"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            engine.submit(job(PROMPT, **wanted), list)
        assert caught.value.field == field
    with pytest.raises(InvalidRequest) as caught:
        engine_of(ours, slots=1).submit(job(PROMPT, guidance_scale=2), list)
    assert caught.value.field == "guidance_scale"
    with pytest.raises(InvalidRequest) as caught:
        engine.submit(job(PROMPT, [2] * 96, guidance_scale=2), list)
    assert caught.value.field == "negative_prompt"
    with pytest.raises(InvalidRequest, match="side by side"):
        generate(ours, PROMPT, {"num_beams": 2})


def test_a_search_among_others_gets_what_it_gets_alone(reference) -> None:
    _, ours = reference
    shared = {"max_tokens": 12, "ignore_end_token": True, "logprobs": 1}
    jobs = [
        job(PROMPT, temperature=0, num_beams=4, n=2, **shared),
        job(PROMPT[1:], num_beams=3, min_tokens=4, **shared),
        job(PROMPT[::-1], penalty_alpha=0.6, top_k=4, **shared),
        job(PROMPT, [3, 9], guidance_scale=2, **shared),
        job(PROMPT, dola_layers="low", prompt_lookup=3, **shared),
        job(PROMPT, n=2, best_of=4, **shared),
        job([4, 5], **shared),
    ]
    alone = [run(engine_of(ours), each)[0] for each in jobs]
    engine = engine_of(ours, slots=6, step_tokens=7)
    assert engine.deterministic
    together = run(engine, *jobs)
    for expected, got in zip(alone, together, strict=True):
        assert not isinstance(got[-1], Failed)
        chosen = [[event for event in events if isinstance(event, Token | Finished)] for events in (expected, got)]
        for index in range(4):
            assert [e for e in chosen[0] if e.index == index] == [e for e in chosen[1] if e.index == index]


def test_a_network_reads_guides_and_branches_from_the_cache() -> None:
    """A guided job with several continuations reads each prompt once."""
    model = tiny_model(context_length=64)
    engine = Engine(model, name="tiny", network=DecoderNetwork(model, 8))
    prompt, negative = list(range(2, 42)), list(range(50, 90))
    wanted = job(prompt, negative, guidance_scale=2, n=3, max_tokens=4, ignore_end_token=True)
    run(engine, wanted)
    assert engine.counters.read_tokens <= 40 + 40 + 3 * 2 * 4
