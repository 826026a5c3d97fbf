"""A request's bits are its own: the same tokens and log-probabilities whatever else the engine computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.tiny import skip_without_int8, tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, GenerateJob, ScoreJob, Token
from topkapi.engine.steps import DecoderNetwork
from topkapi.model import native
from topkapi.model.cache import SlotCache, Work, read, wanted_logits
from topkapi.model.decoding.parameters import resolve
from topkapi.model.generation import generate
from topkapi.model.invariance import TILE, agreeing_sizes, calibrate, rows_agree
from topkapi.model.linear import Linear
from topkapi.model.packing import pack
from topkapi.model.quantize import quantize
from topkapi.model.transformer import Decoder, causal_attention

CONTEXT = 400


FORMS = ["float32", "bfloat16", "float32 packed", "bfloat16 packed", "int8"]
NATIVE = [f"native {held_in}" for held_in in native.FORMATS] if native.levels() else []


def network_of(form: str, family: str = "qwen3") -> Decoder:
    """A random network with its matrices as parameters, packed as for serving, as int8, or in the native core."""
    model = tiny_model(family, context_length=CONTEXT, hidden_size=64, head_dim=16, intermediate_size=192)
    if form.startswith("bfloat16"):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.data = parameter.data.bfloat16()
    if form.startswith("native "):
        native.hold(model, cast(native.HeldIn, form.removeprefix("native ")))
    elif form == "int8":
        skip_without_int8()
        quantize(model)
    elif form.endswith("packed"):
        pack(model)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("form", FORMS)
def test_cached_reading_is_the_network(family: str, form: str) -> None:
    """Reading through the cache computes what plain causal attention computes, up to rounding."""
    model, text = network_of(form, family), tokens(300)
    assert calibrate(model)
    cache = SlotCache(model, slots=2)
    cuts = [text[at : at + 70] for at in range(0, 300, 70)]
    parts = [read(model, cache, [Work(1, at * 70, cut, wanted=len(cut))]) for at, cut in enumerate(cuts)]
    with torch.no_grad():
        plain = model.hidden(torch.tensor([text]), torch.arange(300)[None], causal_attention)[0]
    difference = (torch.cat(parts) - plain).abs().max()
    assert difference < (1e-4 if form.startswith("float32") else 0.2)


class Collector(list[Event]):
    def __call__(self, events: list[Event]) -> None:
        self.extend(events)

    def outcome(self) -> list[Any]:
        assert isinstance(self[-1], Completed)
        assert self[-1].deterministic
        if self[-1].scores is not None:
            return [self[-1].scores]
        return sorted((event for event in self if isinstance(event, Token)), key=lambda event: event.index)


def mixed_jobs() -> list[Any]:
    """64 requests that differ in everything; many share a prefix."""
    jobs: list[Any] = []
    shared = tokens(130, seed=99)
    for index in range(64):
        prompt = (shared if index % 3 == 0 else []) + tokens(1 + index * 37 % 90, seed=index)
        if index % 8 == 7:
            jobs.append(ScoreJob(prompt, top=2))
            continue
        wanted = {
            "seed": index, "max_tokens": 3 + index % 9, "temperature": (index % 4) / 2, "top_k": index % 5 * 7,
            "top_p": 0.9 if index % 2 else 1.0, "min_p": 0.02 * (index % 3), "n": 1 + (index % 11 == 0) * 2,
            "repetition_penalty": 1.0 + (index % 6 == 0) * 0.3, "logprobs": 2, "prompt_lookup": index % 7 * 2,
        }  # fmt: skip
        jobs.append(GenerateJob(prompt, resolve(wanted), priority=index % 2))
    return jobs


def without_guessing(job: Any) -> Any:
    if isinstance(job, ScoreJob):
        return job
    return GenerateJob(job.prompt, replace(job.parameters, prompt_lookup=0), priority=job.priority)


def run(network: DecoderNetwork, jobs: list[Any], step_tokens: int, steps_between: int = 0) -> list[list[Any]]:
    engine = Engine(network.model, name="test", network=network, step_tokens=step_tokens, max_queued_tokens=10**6)
    collectors = [Collector() for _ in jobs]
    for job, collector in zip(jobs, collectors, strict=True):
        engine.submit(job, collector)
        for _ in range(steps_between):
            engine.step()
    while engine.step():
        pass
    return [collector.outcome() for collector in collectors]


# As PyTorch computes where nothing is packed, and with packed bfloat16, they take nine seconds each.
_LONG = [pytest.param(form, marks=pytest.mark.slow) for form in ("float32", "bfloat16 packed")]


@pytest.mark.parametrize("form", [*_LONG, "float32 packed", "int8", *NATIVE])
def test_alone_and_in_every_company_bit_for_bit(form: str) -> None:
    model, jobs = network_of(form), mixed_jobs()
    single = [run(DecoderNetwork(model, 1), [without_guessing(job)], 256)[0] for job in jobs]
    assert run(DecoderNetwork(model, 64), jobs, 256) == single, "64 neighbours"
    assert run(DecoderNetwork(model, 8), jobs, 33) == single, "uneven chunks, prefix hits, waiting"
    assert run(DecoderNetwork(model, 3), jobs, 20, steps_between=2) == single, "preemption by later arrivals"
    assert run(DecoderNetwork(model, 5), jobs[::-1], 64)[::-1] == single, "another order"


@pytest.mark.parametrize("form", ["float32", *NATIVE])
def test_generate_and_the_engine_agree(form: str) -> None:
    network = DecoderNetwork(network_of(form), 4)
    wanted = {"seed": 4, "max_tokens": 25, "temperature": 0.9}
    got = run(network, [GenerateJob(tokens(30, 5), resolve(wanted))], 256)[0]
    assert [token.token_id for token in got] == generate(network.model, tokens(30, 5), wanted).token_ids


@pytest.mark.parametrize("form", ["float32", *NATIVE])
def test_log_probabilities_of_a_prompt_are_equal_cold_and_after_a_prefix_hit(form: str) -> None:
    model, text = network_of(form), tokens(200)
    assert calibrate(model)
    cold = SlotCache(model, 1)
    whole = wanted_logits(model, read(model, cold, [Work(0, 0, text, wanted=60)]))
    warm = SlotCache(model, 2)
    read(model, warm, [Work(0, 0, text[:145])])
    warm.copy(0, 1, 0, 140)
    read(model, warm, [Work(0, 145, tokens(50, 3))])
    assert torch.equal(wanted_logits(model, read(model, warm, [Work(1, 140, text[140:], wanted=60)])), whole)


def test_row_counts_that_disagree_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.functional.linear

    def in_another_order_above_eight(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias) if len(x) > 8 else linear(x.flip(1), weight.flip(1), bias)

    for dtype in (torch.float32, torch.bfloat16):
        shape, device = torch.Size((40, 30)), torch.device("cpu")
        natural = agreeing_sizes(shape, dtype, device)
        monkeypatch.setattr(torch.nn.functional, "linear", in_another_order_above_eight)
        assert agreeing_sizes(shape, dtype, device) == [size for size in natural if size > 8]
        monkeypatch.undo()


def test_tiles_make_any_product_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine's products never agree, fixed tiles do, with the same values up to rounding."""
    model = network_of("float32")
    plain = model(torch.tensor([tokens(50)]), torch.arange(50)[None])
    linear = torch.nn.functional.linear

    def fickle(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias) * (1 + x.flatten(0, -2).shape[0] * 1e-6)

    monkeypatch.setattr(torch.nn.functional, "linear", fickle)
    assert not rows_agree(model)
    assert calibrate(model)
    assert all(module.tile == TILE for module in model.modules() if isinstance(module, Linear))
    monkeypatch.undo()
    tiled = model(torch.tensor([tokens(50)]), torch.arange(50)[None])
    torch.testing.assert_close(tiled, plain)


def test_attention_in_tiles_is_attention() -> None:
    model = network_of("float32")
    assert calibrate(model)
    text = tokens(90)
    whole = read(model, SlotCache(model), [Work(0, 0, text, wanted=90)])
    model.query_tile = TILE
    assert rows_agree(model)
    torch.testing.assert_close(read(model, SlotCache(model), [Work(0, 0, text, wanted=90)]), whole)


def test_repeating_text_is_guessed_and_takes_fewer_steps() -> None:
    network = DecoderNetwork(network_of("float32"), 1)
    wanted = {"temperature": 0, "max_tokens": 80, "ignore_end_token": True}
    engines, outcomes = [], []
    for lookup in (0, 16):
        engine, collector = Engine(network.model, name="test", network=network), Collector()
        engine.submit(GenerateJob([7, 8, 9] * 4, resolve(wanted | {"prompt_lookup": lookup})), collector)
        while engine.step():
            pass
        engines.append(engine)
        outcomes.append(collector.outcome())
    assert outcomes[0] == outcomes[1]
    assert engines[1].counters.accepted_tokens > 20
    assert engines[1].counters.steps <= engines[0].counters.steps - engines[1].counters.accepted_tokens
