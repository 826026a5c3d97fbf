"""The native core against the network as PyTorch computes it, and each instruction set against the plainest one."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import tiny_config, tiny_model
from topkapi.model import native
from topkapi.model.cache import SlotCache, Work, outputs, read, wanted_logits
from topkapi.model.core_fields import beyond_core
from topkapi.model.errors import EngineError, SettingsError
from topkapi.model.families import FAMILIES
from topkapi.model.generation import generate
from topkapi.model.native import library
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.transformer import Decoder, SelfAttention

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")

LENGTH = 41
COMPUTED = [family for family in FAMILIES if not beyond_core(tiny_config(family))]
# Those that differ in what is computed.
DIFFERENT = ["gpt2", "llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt_neox", "granite"]
# How far products may be off that hold four bits, eight, or sixteen with eight of fraction.
TOLERANCE: dict[native.HeldIn, float] = {
    "float32": 1e-6, "bfloat16": 4e-3, "int8": 1.5e-2, "int4": 0.15, "w8a8": 2e-2, "w4a8": 0.15,
}  # fmt: skip
# Norms behind a layer's parts enlarge what was rounded in them, where random networks make little of it.
ENLARGED = {"gemma2": 3, "gemma3_text": 3, "olmo2": 3}
# Sizes that fill no block: of 16 outputs, of 64 or 256 inputs that share a scale, of 16 components or keys.
ODD = {"hidden_size": 40, "intermediate_size": 52, "head_dim": 10, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 101}
# Inputs of two groups with a scale each, and of a piece of a third.
LARGE = {"intermediate_size": 1100}


def held(model: Decoder, held_in: native.HeldIn, level: str | None = None, threads: int = 1) -> Decoder:
    native.hold(model, held_in, level=level, threads=threads)
    return model


def text(model: Decoder, seed: int = 0, length: int = LENGTH) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()


def with_cache(model: Decoder, cache_dtype: str) -> Decoder:
    model.cache_dtype = cache_dtype
    return model


def logits(model: Decoder, token_ids: Sequence[int]) -> Tensor:
    cache = SlotCache(model, 2)
    return wanted_logits(model, read(model, cache, [Work(1, 0, token_ids, wanted=len(token_ids))]))


def sizes(family: str, shape: dict[str, int]) -> dict[str, int]:
    return {**shape, "num_kv_heads": shape["num_heads"]} if family == "gpt2" and "num_heads" in shape else shape


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped")
def test_the_file_is_let_go(tiny_checkpoint: Callable[..., Path]) -> None:
    """The vectors that the network keeps are small; the file that they came from is not."""
    path = tiny_checkpoint("mapped")
    model = load_checkpoint(path).model
    native.hold(model, "int8")
    gc.collect()
    assert str(path / "model.safetensors") not in Path("/proc/self/maps").read_text()
    assert next(model.parameters()).numel() and any(not each.is_meta for each in model.parameters())


@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("family", COMPUTED)
@pytest.mark.parametrize("held_in", native.FORMATS)
def test_it_computes_what_the_network_is(family: str, held_in: native.HeldIn, shape: dict[str, int]) -> None:
    plain = tiny_model(family, scale=2.0, **sizes(family, shape))
    token_ids = text(plain)
    expected = logits(plain, token_ids)
    found = logits(held(plain, held_in), token_ids)
    assert plain.held_in == held_in
    assert (found - expected).norm() / expected.norm() < TOLERANCE[held_in] * ENLARGED.get(family, 1)


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        pytest.param(family, shape, id=f"{family}-{name}", marks=[] if name == "even" or few else [pytest.mark.slow])
        for family in DIFFERENT
        for name, shape, few in [("even", {}, True), ("odd", ODD, family in ("gpt2", "llama", "gemma2"))]
    ],
)
@pytest.mark.parametrize("held_in", native.FORMATS)
def test_a_rows_bits_are_the_same_in_every_batch_and_on_every_processor(
    family: str, held_in: native.HeldIn, shape: dict[str, int]
) -> None:
    check_bits(family, held_in, shape)


@pytest.mark.parametrize("held_in", ["int8", "int4", "w8a8", "w4a8"])
def test_a_rows_bits_are_the_same_where_inputs_have_several_scales(held_in: native.HeldIn) -> None:
    check_bits("llama", held_in, LARGE)


def check_bits(family: str, held_in: native.HeldIn, shape: dict[str, int]) -> None:
    reference = held(tiny_model(family, scale=2.0, **sizes(family, shape)), held_in, "scalar")
    token_ids, other = text(reference), text(reference, 1)
    expected = logits(reference, token_ids)
    for level in native.levels():
        for threads in (1, 2):
            model = held(tiny_model(family, scale=2.0, **sizes(family, shape)), held_in, level, threads)
            assert torch.equal(logits(model, token_ids), expected), (level, threads)
            cache = SlotCache(model, 4)
            parts = [read(model, cache, [Work(0, 0, token_ids[:5], wanted=5), Work(2, 0, other[:1])])[:5]]
            parts.append(read(model, cache, [Work(2, 1, other[1:20]), Work(0, 5, token_ids[5:30], wanted=25)])[1:])
            for at in range(30, LENGTH):
                one, two = Work(2, at - 10, other[at - 10 : at - 9]), Work(3, at - 30, other[at - 30 : at - 29])
                parts.append(read(model, cache, [one, Work(0, at, token_ids[at : at + 1]), two])[1:2])
            states = torch.cat(parts)
            by_threes = torch.cat([wanted_logits(model, states[at : at + 3]) for at in range(0, LENGTH, 3)])
            assert torch.equal(by_threes, expected), (level, threads)


@pytest.mark.parametrize("held_in", ["float32", "int8", "int4", "w8a8", "w4a8"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_a_rows_bits_are_the_same_in_long_passes(family: str, held_in: native.HeldIn) -> None:
    """Where there are many rows, each thread takes some through a layer alone."""
    shape = {"context_length": 300, "num_layers": 3 if family != "gemma2" else 2}
    reference = held(tiny_model(family, scale=2.0, **shape), held_in, "scalar")
    token_ids, other = text(reference, length=281), text(reference, 1, length=60)
    cache = SlotCache(reference, 2)
    works = [Work(0, at, token_ids[at : at + 40], wanted=40, layers=(1,)) for at in range(0, 280, 40)]
    found = [outputs(reference, cache, [work])[0] for work in works]
    expected, early = (torch.cat([getattr(each, name) for each in found], -2) for name in ("logits", "early"))
    for level in native.levels():
        for threads in (1, 2):
            model = held(tiny_model(family, scale=2.0, **shape), held_in, level, threads)
            cache = SlotCache(model, 3)
            long = Work(2, 0, token_ids[:230], wanted=230, layers=(1,))
            first, _ = outputs(model, cache, [long, Work(0, 0, other)])
            second = [Work(0, 60, [1]), Work(2, 230, token_ids[230:280], wanted=50, layers=(1,)), Work(1, 0, [2])]
            rest = outputs(model, cache, second)[1]
            assert torch.equal(torch.cat([first.logits, rest.logits]), expected), (level, threads)
            assert torch.equal(torch.cat([first.early, rest.early], 1), early), (level, threads)


@pytest.mark.parametrize("shape", [{}, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama"])
@pytest.mark.parametrize("cache_dtype", native.CACHES)
def test_keys_and_values_have_fewer_bits(family: str, cache_dtype: str, shape: dict[str, int]) -> None:
    reference = held(tiny_model(family, scale=2.0, **sizes(family, shape)), "float32", "scalar")
    token_ids, other = text(reference), text(reference, 1)
    exact = logits(reference, token_ids)
    expected = logits(with_cache(reference, cache_dtype), token_ids)
    lost = float((expected - exact).norm() / exact.norm())
    assert lost <= {"float32": 0, "float16": 1e-3, "int8": 2e-2}[cache_dtype]
    assert (lost > 0) == (cache_dtype != "float32")
    whole = reference.core
    assert whole is not None
    assert whole.token_bytes(cache_dtype) < whole.token_bytes("float32") or cache_dtype == "float32"
    for level in native.levels():
        model = held(tiny_model(family, scale=2.0, **sizes(family, shape)), "float32", level, threads=2)
        cache = SlotCache(with_cache(model, cache_dtype), 3)
        parts = [read(model, cache, [Work(0, 0, token_ids[:21], wanted=21), Work(1, 0, other[:3])])[:21]]
        cache.copy(0, 2, 0, 21)
        for at in range(21, LENGTH):
            row = read(model, cache, [Work(1, at - 18, other[at - 18 : at - 17]), Work(2, at, token_ids[at : at + 1])])
            parts.append(row[1:])
        assert torch.equal(wanted_logits(model, torch.cat(parts)), expected), level


@pytest.mark.parametrize("cache_dtype", native.CACHES)
@pytest.mark.parametrize("level", native.levels())
def test_what_is_too_large_for_half_precision_stays_a_number(cache_dtype: str, level: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SelfAttention):
                module.v_proj.weight *= 1e7
    assert bool(logits(with_cache(held(model, "float32", level), cache_dtype), text(model)).isfinite().all())


@pytest.mark.parametrize("level", native.levels())
def test_a_prefix_that_is_copied_is_as_if_it_had_been_read(level: str) -> None:
    model = held(tiny_model("qwen3", scale=2.0), "int8", level)
    token_ids = text(model)
    cache = SlotCache(model, 3)
    whole = read(model, cache, [Work(0, 0, token_ids, wanted=3)])
    cache.copy(0, 2, 0, 21)
    assert torch.equal(read(model, cache, [Work(2, 21, token_ids[21:], wanted=3)]), whole)


def test_earlier_states_are_those_of_the_network() -> None:
    plain, core = tiny_model("llama", scale=2.0), held(tiny_model("llama", scale=2.0), "float32")
    token_ids = text(plain)
    works = [Work(0, 0, token_ids, wanted=2, states=2, layers=(0, 1))]
    (expected,), (found,) = (outputs(model, SlotCache(model), works) for model in (plain, core))
    for name in ("logits", "states", "early"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("held_in", "cache_dtype"), [*((each, "float32") for each in native.FORMATS), ("int8", "float16"), ("int8", "int8")]
)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("level", native.levels())
def test_damage_shows(held_in: native.HeldIn, cache_dtype: str, damage: float, level: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.embed_tokens.weight[7, 3] = damage
    token_ids = [1, 2, 7, 4]
    rows = logits(with_cache(held(model, held_in, level), cache_dtype), token_ids)
    assert bool(rows[:2].isfinite().all()) or model.config.tie_embeddings
    assert not bool(rows[2].isfinite().any())


def test_a_text_is_continued_as_the_network_would() -> None:
    for family in COMPUTED:
        plain = tiny_model(family, scale=2.0)
        prompt = text(plain, length=9)
        expected = generate(plain, prompt, {"max_tokens": 20, "temperature": 0}).token_ids
        assert (
            generate(held(plain, "float32", threads=2), prompt, {"max_tokens": 20, "temperature": 0}).token_ids
            == expected
        )


def test_matrices_are_in_one_place_only() -> None:
    model = held(tiny_model("qwen3"), "int8")
    assert [name for name, each in model.named_parameters() if each.ndim == 2 and not each.is_meta] == []
    assert not native.can_hold(model)


def test_what_cannot_be_computed_is_refused() -> None:
    model = held(tiny_model("llama"), "int8")
    cache = SlotCache(model, 2)
    context = model.config.context_length
    for slot, start, token_ids in [
        (2, 0, [1]), (-1, 0, [1]), (0, -1, [1]), (0, context, [1]), (0, context - 1, [1, 2]),
        (0, 0, [model.config.vocab_size]), (0, 0, [-1]), (0, 0, []),
    ]:  # fmt: skip
        with pytest.raises(EngineError, match="cannot compute"):
            read(model, cache, [Work(slot, start, token_ids)])


def test_two_threads_compute_at_a_time() -> None:
    """An embedding is computed while the engine answers: each has a cache of its own, both have the same core."""
    model = held(tiny_model("qwen3", scale=2.0), "int8", threads=2)
    texts = [text(model, seed) for seed in range(4)]
    expected = [logits(model, each) for each in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(lambda token_ids: logits(model, token_ids), texts))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_child_of_a_fork_computes_alone() -> None:
    model = held(tiny_model("llama", scale=2.0), "int8", threads=2)
    token_ids = text(model)
    expected = logits(model, token_ids)
    receiving, sending = os.pipe()
    child = os.fork()
    if not child:
        os.write(sending, b"same" if torch.equal(logits(model, token_ids), expected) else b"other")
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        assert pipe.read() == b"same"
    assert os.waitpid(child, 0)[1] == 0


def test_other_threads_run_while_a_long_pass_does() -> None:
    """The pass is outside the interpreter's lock: a thread of Python counts on."""
    model = held(tiny_model("llama", context_length=2048, hidden_size=128, intermediate_size=512), "float32")
    over, counted = threading.Event(), [0]

    def count() -> None:
        while not over.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    try:
        before = counted[0]
        read(model, SlotCache(model), [Work(0, 0, text(model, length=2048))])
        assert counted[0] > before
    finally:
        over.set()
        counter.join()


@contextmanager
def loaded_anew() -> Iterator[None]:
    """Within, what is known of the core is found out again, and after it once more."""
    caches = (library._loaded, library.library, library.levels)
    for cached in caches:
        cached.cache_clear()
    try:
        yield
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize("value", ["0", "scalar", "1", ""])
def test_the_environment_chooses(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = native.levels()
    monkeypatch.setenv("TOPKAPI_NATIVE", value)
    with loaded_anew():
        levels, why = native.levels(), native.why_not()
    if value == "0":
        assert levels == () and "switched off" in str(why)
    else:
        assert levels[0] == "scalar" and why is None
        assert (levels == ("scalar",)) == (value == "scalar" or len(there) == 1)


def test_an_unknown_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOPKAPI_NATIVE", "mmx")
    with (
        loaded_anew(),
        pytest.raises(SettingsError, match="TOPKAPI_NATIVE=mmx is no instruction set of this processor"),
    ):
        native.levels()


def test_a_core_of_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update that nobody has compiled: its structures may be laid out otherwise."""
    with loaded_anew(), monkeypatch.context() as changed:
        changed.setattr(library, "digest_of_sources", lambda: "0" * 64)
        assert library.library() is None and library.levels() == ()
        assert "built from other sources" in str(library.why_not())
    assert native.levels()
