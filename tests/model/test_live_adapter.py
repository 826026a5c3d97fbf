"""LoRA beside a served network: each row has its own adapter, and bits that are its own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.tiny import skip_without_int8, tiny_model
from topkapi.engine.engine import Engine
from topkapi.engine.request import Completed, Event, GenerateJob, Job, ScoreJob, Token
from topkapi.engine.steps import DecoderNetwork
from topkapi.model import native
from topkapi.model.cache import SlotCache, Work, outputs, read
from topkapi.model.decoding.parameters import resolve
from topkapi.model.embedding import embed
from topkapi.model.errors import EngineError
from topkapi.model.live_adapter import LiveAdapter, LowRank
from topkapi.model.packing import pack
from topkapi.model.quantize import quantize
from topkapi.model.transformer import Decoder

CONTEXT = 300
TARGETS = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (192, 64), "mlp.up_proj": (192, 64), "mlp.down_proj": (64, 192),
}  # fmt: skip
FORMS = ["float32", "packed", "int8", *(f"native {held_in}" for held_in in (native.FORMATS if native.levels() else ()))]


def network_of(form: str, family: str = "qwen3", threads: int = 2) -> Decoder:
    """A random network, held in one of `FORMS`."""
    model = tiny_model(family, context_length=CONTEXT, hidden_size=64, head_dim=16, intermediate_size=192)
    if form.startswith("native "):
        native.hold(model, cast(native.HeldIn, form.removeprefix("native ")), threads=threads)
    elif form == "int8":
        skip_without_int8()
        quantize(model)
    elif form == "packed":
        pack(model)
    return model


def matrices_of(seed: int, rank: int | None = None, share: float = 0.7) -> dict[str, LowRank]:
    """Random adapters of some of the matrices, each of a rank of its own."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    found: dict[str, LowRank] = {}
    for layer in range(2):
        for name, (out, into) in TARGETS.items():
            inner = rank or choose.randint(1, 20)
            if choose.random() < share or not found:
                down = torch.randn(inner, into, generator=generator) * into**-0.5
                found[f"layers.{layer}.{name}"] = down, torch.randn(out, inner, generator=generator) * 0.3
    return found


def merged(matrices: dict[str, LowRank]) -> Decoder:
    """The plain network with the adapter's numbers in its matrices: the reference."""
    model = network_of("float32")
    for name, (down, up) in matrices.items():
        module = cast(Any, model.get_submodule(name))
        module.weight.data += up @ down
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(model: Decoder, text: Sequence[int], adapter: LiveAdapter | None = None) -> Tensor:
    cache = SlotCache(model)
    return outputs(model, cache, [Work(0, 0, text, wanted=len(text), adapter=adapter)])[0].logits


@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_network_with_the_adapter_in_its_matrices(form: str) -> None:
    """A prompt that threads share by rows, and one that they share by columns."""
    matrices, model = matrices_of(1, share=1.0), network_of(form)
    adapter = LiveAdapter(model, matrices)
    eight_bits = dict.fromkeys(("int8", "native int8", "native w8a8"), 0.06)
    four_bits = dict.fromkeys(("native int4", "native w4a8"), 0.5)
    off = {"native bfloat16": 0.02, **four_bits, **eight_bits}.get(form, 2e-5)
    for length in (30, 200):
        text = tokens(length)
        expected, plain = logits_of(merged(matrices), text), logits_of(network_of("float32"), text)
        found = logits_of(model, text, adapter)
        assert (found - expected).abs().max() <= off * expected.abs().max()
        assert (plain - expected).abs().max() > 0.3 * expected.abs().max(), "it changes what is computed"
        assert torch.equal(logits_of(model, text), logits_of(network_of(form), text)), "and nothing of the others"


def test_families_have_their_own_places_for_it() -> None:
    """Without a gate, with biases, norms behind a part, both parts from one state, and multipliers."""
    for family in ("gpt2", "gemma2", "gpt_neox", "granite", "olmo2"):
        # Other numbers may cancel out: what is compared is rounded to float32.
        torch.manual_seed(1)
        plain = tiny_model(family)
        found: dict[str, LowRank] = {}
        for name, module in plain.layers.named_modules(prefix="layers"):
            if name.endswith("_proj"):
                out, into = cast(Tensor, module.weight).shape
                found[name] = torch.randn(3, into), torch.randn(out, 3) * 0.2
        text = tokens(40)
        live = LiveAdapter(plain, found)
        computed = [logits_of(plain, text, live)]
        if native.levels():
            other = tiny_model(family)
            native.hold(other, "float32", threads=1)
            computed.append(logits_of(other, text, LiveAdapter(other, found)))
        reference = tiny_model(family)
        for name, (down, up) in found.items():
            cast(Any, reference.get_submodule(name)).weight.data += up @ down
        expected = logits_of(reference, text)
        for each in computed:
            assert (each - expected).abs().max() <= 3e-5 * expected.abs().max(), family


def jobs_of(adapters: Sequence[LiveAdapter | None]) -> list[Job]:
    """Requests that begin alike, of which some are long, with every adapter and with none."""
    choose, shared = random.Random(3), tokens(40, 9)
    jobs: list[Job] = []
    for number, adapter in enumerate(adapters):
        prompt = (shared if number % 2 else []) + tokens(choose.choice([1, 5, 30, 150]), number)
        asked: dict[str, Any] = {"seed": number, "max_tokens": choose.randint(2, 9), "logprobs": 2}
        asked |= choose.choice([{}, {"temperature": 0}, {"n": 2}, {"prompt_lookup": 4}, {"guidance_scale": 1.5},
                                {"num_beams": 2}, {"dola_layers": "low"}])  # fmt: skip
        jobs.append(GenerateJob(prompt, resolve(asked), adapter=adapter))
        if number % 5 == 0:
            jobs.append(ScoreJob(prompt + tokens(20, number), top=2, adapter=adapter))
    return jobs


def events_of(model: Decoder, jobs: Sequence[Job], together: int) -> list[list[Any]]:
    """What each job is told of tokens and scores, with so many of them at a time."""
    engine = Engine(model, name="mixed", network=DecoderNetwork(model, together + 2), max_queue=len(jobs))
    told: list[list[Event]] = [[] for _ in jobs]
    waiting = list(enumerate(jobs))
    while waiting or engine.running or engine.waiting:
        while waiting and engine.running + engine.waiting < together:
            number, job = waiting.pop(0)
            engine.submit(job, told[number].extend)
        engine.step()
    assert engine.deterministic
    return [
        [
            event.scores if isinstance(event, Completed) else event
            for event in each
            if isinstance(event, Token | Completed)
        ]
        for each in told
    ]


_LONG = [pytest.param(form, marks=pytest.mark.slow) for form in ("float32", *["native int8"] * bool(native.levels()))]


@pytest.mark.parametrize("form", ["int8", *["native float32"] * bool(native.levels()), *_LONG])
def test_twenty_adapters_and_the_base_in_one_batch_give_each_request_what_it_gets_alone(form: str) -> None:
    model = network_of(form)
    adapters: list[LiveAdapter | None] = [LiveAdapter(model, matrices_of(seed)) for seed in range(20)]
    jobs = jobs_of([*adapters, *[None] * 5, *adapters[:5]])
    alone = events_of(model, jobs, 1)
    random.Random(5).shuffle(order := list(range(len(jobs))))
    mixed = events_of(model, [jobs[at] for at in order], 24)
    for at, events in zip(order, mixed, strict=True):
        assert events == alone[at], jobs[at]
    assert len({str(events) for events in alone}) > 20, "adapters differ"


def test_what_one_adapter_left_in_the_cache_is_of_no_use_to_another() -> None:
    model = network_of("float32")
    first, second = (LiveAdapter(model, matrices_of(seed)) for seed in (1, 2))
    engine = Engine(model, name="cached")
    cached = []
    for adapter in (None, first, second, first, None, LiveAdapter(model, matrices_of(1))):
        told: list[Event] = []
        engine.submit(GenerateJob(tokens(60), resolve({"max_tokens": 1}), adapter=adapter), told.extend)
        while engine.step():
            pass
        cached.append(told[-1].cached_tokens if isinstance(told[-1], Completed) else None)
    assert cached == [0, 0, 0, 59, 59, 0]


def test_an_embedding_is_the_adapter_s_too() -> None:
    model = network_of("float32")
    adapter = LiveAdapter(model, matrices_of(1))
    assert embed(model, tokens(20)) != embed(model, tokens(20), adapter=adapter)


@pytest.mark.skipif(not native.levels(), reason="there is no native core")
@pytest.mark.parametrize(
    "matrices",
    [
        {"layers.0.self_attn.q_proj": (torch.ones(2, 63), torch.ones(64, 2))},
        {"layers.0.self_attn.q_proj": (torch.ones(2, 64), torch.ones(63, 2))},
        {"layers.0.self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 3))},
        {"layers.2.self_attn.q_proj": (torch.ones(2, 64), torch.ones(64, 2))},
    ],
)
def test_the_core_takes_none_that_does_not_fit(matrices: dict[str, LowRank]) -> None:
    with pytest.raises(EngineError):
        LiveAdapter(network_of("native float32"), matrices)


@pytest.mark.skipif(not native.levels(), reason="there is no native core")
def test_threads_and_instructions_change_no_bit() -> None:
    text, matrices = tokens(200), matrices_of(4)
    found = []
    for level in native.levels():
        for threads in (1, 3):
            model = network_of("float32")
            native.hold(model, "float32", level=level, threads=threads)
            adapter, cache = LiveAdapter(model, matrices), SlotCache(model)
            states = [read(model, cache, [Work(0, 0, text[:150], 150, adapter=adapter)])]
            states += [read(model, cache, [Work(0, 150, text[150:], 50, adapter=adapter)])]
            found.append(torch.cat(states))
    assert all(torch.equal(each, found[0]) for each in found)
