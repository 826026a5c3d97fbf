"""What the native core tells of rows of logits against numpy, for each instruction set, and choosing by it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.decoding.decoding_cases import EVERY_STRATEGY, HISTORY, PROMPT_LENGTH, Marked
from tests.tiny import tiny_model
from topkapi.engine.steps import DecoderNetwork
from topkapi.model import native
from topkapi.model.cache import SlotCache, Work, outputs
from topkapi.model.decoding.choosing import UnusableLogits, choose
from topkapi.model.decoding.noise import loud_from, loud_tokens
from topkapi.model.decoding.parameters import resolve
from topkapi.model.decoding.stage import Row
from topkapi.model.native.scanning import Floats, Scan, Scanner

pytestmark = pytest.mark.skipif(not native.levels(), reason="the native core was not built: there was no compiler")

LEVELS = native.levels() or ("none",)
# Around the sizes of a vector and of a piece, and those of real vocabularies; none of the last is a multiple of 16.
SIZES = st.one_of(st.integers(1, 300), st.sampled_from([1023, 4097, 32_001, 50_257, 70_000]))


@st.composite
def logits(draw: st.DrawFn) -> Floats:
    """Rows of logits: with ties, with tokens ruled out, with a single one left, with none."""
    size, seed = draw(SIZES), draw(st.integers(0, 2**32))
    generator = np.random.default_rng(seed)
    rows = []
    for kind in draw(
        st.lists(st.sampled_from(["plain", "ties", "ruled out", "one", "none", "wide"]), min_size=1, max_size=5)
    ):
        row = generator.standard_normal(size).astype(np.float32) * np.float32(3)
        if kind == "ties":
            row = np.round(row)
        if kind == "wide":
            row *= np.float32(1e5)
        if kind in ("ruled out", "none"):
            row[generator.random(size) < (0.9 if kind == "ruled out" else 2)] = -np.inf
        if kind == "one":
            row[:] = -np.inf
            row[generator.integers(size)] = -2.0
        rows.append(row)
    return np.stack(rows)


def scanned(level: str, rows: Floats, threads: int = 2) -> Scan:
    return Scanner(level, threads)(torch.from_numpy(rows).unbind())


def check_found(found: tuple[Floats, np.ndarray], rows: Floats, wanted: np.ndarray) -> None:
    """Found are just the tokens that `wanted [B, V]` marks, in order, and then padding."""
    values, ids = found
    assert values.shape == ids.shape
    for row, value, token_ids, mask in zip(rows, values, ids, wanted, strict=True):
        expected = np.flatnonzero(mask)
        assert token_ids[: len(expected)].tolist() == expected.tolist()
        assert (value[: len(expected)] == row[expected]).all()
        assert (token_ids[len(expected) :] == len(row)).all() and (value[len(expected) :] == -np.inf).all()


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=25)
@given(logits(), st.data())
def test_it_finds_what_numpy_finds(level: str, rows: Floats, data: st.DataObject) -> None:
    scan = scanned(level, rows)
    assert (scan.best == rows.max(axis=-1)).all()
    assert (scan.first == rows.argmax(axis=-1)).all()
    count, size = rows.shape
    values = rows[:, data.draw(st.integers(0, size - 1))]
    assert scan.above(values) == (rows > values[:, None]).sum(axis=-1).tolist()
    divisors = np.array(
        data.draw(st.lists(st.floats(2**-10, 1000, width=32), min_size=count, max_size=count)), np.float32
    )
    for divided, divisor in ((scan, np.ones(count, np.float32)), (scan.divide(divisors), divisors)):
        assert divided is not None
        expected = rows / divisor[:, None]
        assert (divided.written() == expected).all()
        assert (divided.best == expected.max(axis=-1)).all()
        floors = expected[:, data.draw(st.integers(0, size - 1))]
        check_found(divided.at_least(floors), expected, expected >= floors[:, None])
        k = np.array(data.draw(st.lists(st.integers(1, size), min_size=count, max_size=count)))
        kth = np.sort(expected, axis=-1)[np.arange(count), size - k]
        check_found(divided.largest(k), expected, expected >= kth[:, None])
        keys = np.array(data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count)))
        loud = np.stack(loud_tokens(torch.from_numpy(keys), size, None, 4.0))
        found = divided.outstanding(floors, keys, loud_from(4.0))
        check_found(found, expected, loud | (expected >= floors[:, None]))


@settings(deadline=None, max_examples=25)
@given(logits())
def test_sums_are_right_and_the_same_bits_everywhere(rows: Floats) -> None:
    """On each instruction set, by one thread or two, alone or beside others."""
    rows = rows[rows.max(axis=-1) > -np.inf]
    if not len(rows):
        return
    reference = scanned("scalar", rows[:2], 1).totals()
    for level in native.levels()[1:]:
        for threads in (1, 2):
            for expected, found in zip(reference, scanned(level, rows, threads).totals(), strict=True):
                assert found[:2].tobytes() == expected.tobytes()
    below = rows.astype(np.float64) - rows.max(axis=-1, keepdims=True)
    weights = np.exp(below)
    sums, weighted = scanned(native.levels()[-1], rows).totals()
    assert np.allclose(sums, weights.sum(axis=-1), rtol=1e-6)
    below[below == -np.inf] = 0
    assert np.allclose(weighted, -(weights * below).sum(axis=-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_no_number_is_seen_wherever_it_stands(level: str) -> None:
    for size in (1, 16, 65, 200):
        rows = np.full((size + 1, size), -np.inf, dtype=np.float32)
        rows[np.arange(size), np.arange(size)] = np.nan
        rows[size] = 1
        best = scanned(level, rows).best
        assert np.isnan(best[:size]).all() and best[size] == 1
        with pytest.raises(UnusableLogits) as caught:
            row_of = [Row(resolve({"seed": 1}), [1], 1) for _ in rows]
            choose(torch.from_numpy(rows), row_of, scanner=Scanner(level))
        assert caught.value.rows == tuple(range(size))
    with pytest.raises(UnusableLogits):
        choose(torch.full((1, 4), -math.inf), [Row(resolve({"seed": 1}), [1], 1)], scanner=Scanner(level))


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level: str) -> None:
    """So many rows are shared among threads; they find what one finds."""
    generator = np.random.default_rng(7)
    rows = torch.from_numpy(generator.standard_normal((8 if level == "scalar" else 32, 50_257)).astype(np.float32) * 3)
    keys = generator.integers(-(2**62), 2**62, len(rows))
    one, two = (Scanner(level, threads)(rows.unbind()) for threads in (1, 2))
    assert (one.best == two.best).all() and (one.first == two.first).all()
    floors = one.best - 3
    for name, arguments in (
        ("totals", ()), ("at_least", (floors,)), ("outstanding", (floors, keys, loud_from(5.5))),
        ("largest", (np.arange(1, len(rows) + 1) ** 2,)),
    ):  # fmt: skip
        for first, second in zip(getattr(one, name)(*arguments), getattr(two, name)(*arguments), strict=True):
            assert first.tobytes() == second.tobytes()
    assert one.above(floors) == two.above(floors)


@pytest.mark.parametrize("scanner", [None, Scanner], ids=["numpy", "core"])
def test_ties_at_the_cut_all_stay_alone_and_among_others(scanner: type[Scanner] | None) -> None:
    """With top-k 3 and five tokens tied at the third place, six can be chosen, whatever stands beside the row."""
    row = torch.full((1000,), -4.0)
    row[[10, 200, 300, 400, 500, 999]] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    scan = scanner() if scanner else None
    parameters = [resolve({"seed": seed, "top_k": 3, "logprobs": 0}) for seed in range(40)]
    alone = [choose(row[None], [Row(each, [1], 1)], scanner=scan)[0] for each in parameters]
    assert choose(row.expand(40, -1), [Row(each, [1], 1) for each in parameters], scanner=scan) == alone
    assert {choice.token_id for choice in alone} == {10, 200, 300, 400, 500, 999}
    assert {round(choice.logprob or 0, 6) for choice in alone if choice.token_id != 10} == {
        round(1 - math.log(math.exp(2) + 5 * math.e), 6)
    }


WIDE = torch.stack([
    torch.randn(50_257, generator=torch.Generator().manual_seed(1)) * 3,
    -1.3 * torch.arange(1, 50_258).log(),
    torch.randn(50_257, generator=torch.Generator().manual_seed(2)).round() * 2,
    torch.randn(50_257, generator=torch.Generator().manual_seed(3)) * 0.01,
])  # fmt: skip


@pytest.mark.parametrize(("name", "parameters"), EVERY_STRATEGY, ids=[str(p) for _, p in EVERY_STRATEGY])
def test_a_scan_chooses_what_numpy_chooses(name: str, parameters: dict) -> None:
    """The tokens, ranks and leaders are equal; log-probabilities to within the rounding of their sums."""
    rows = [
        Row(resolve({"seed": n, "logprobs": 3, **parameters}, vocabulary=Marked()), list(HISTORY), PROMPT_LENGTH)
        for n in range(len(WIDE))
    ]
    others = [replace(row) for row in rows]
    for plain, fast in zip(choose(WIDE, rows), choose(WIDE, others, scanner=Scanner()), strict=True):
        assert (fast.token_id, fast.rank, [each for each, _ in fast.top]) == (
            plain.token_id, plain.rank, [each for each, _ in plain.top],
        )  # fmt: skip
        # What PyTorch adds up of a flat row is off by 1e-5, by 3e-5 with AVX2; the core's sums are held to 1e-6 above.
        assert fast.logprob == pytest.approx(plain.logprob, abs=1e-4)
        assert fast.raw_logprob == pytest.approx(plain.raw_logprob, abs=1e-4)


CUT = st.fixed_dictionaries(
    {"temperature": st.one_of(st.just(1.0), st.floats(0.01, 30.0))},
    optional={
        "top_k": st.one_of(st.integers(1, 400), st.just(60_000)),
        "top_p": st.one_of(st.floats(0.01, 0.9999), st.just(0.5)),
        "min_p": st.floats(1e-6, 0.9),
        "order": st.permutations(["temperature", "top_k", "top_p", "min_p"]),
        "dynamic_temperature_range": st.floats(0.1, 1.0),
    },
)


@pytest.mark.parametrize("level", LEVELS)
@settings(deadline=None, max_examples=60)
@given(logits(), CUT, st.integers(0, 2**53 - 9))
def test_what_is_drawn_at_once_is_drawn_one_stage_after_another(
    level: str, rows: Floats, given_parameters: dict, seed: int
) -> None:
    """And rows that want to know more are drawn like those that do not, one by one and by numpy alone."""
    alive = rows[rows.max(axis=-1) > -np.inf]
    for at, row in enumerate(torch.from_numpy(alive)):
        bare = Row(resolve({"seed": seed + at, **given_parameters}), [1], 1, sequence=at)
        telling = replace(bare, parameters=replace(bare.parameters, logprobs=0))
        with pytest.MonkeyPatch.context() as patch:
            at_once = choose(row[None], [bare], scanner=Scanner(level))
            patch.setattr(Scan, "drawn", None)
            assert at_once == choose(row[None], [bare]), "numpy"
            assert at_once[0].token_id == choose(row[None], [telling], scanner=Scanner(level))[0].token_id
    if len(alive):
        every = [Row(resolve({"seed": seed + at, **given_parameters}), [1], 1, sequence=at) for at in range(len(alive))]
        together = choose(torch.from_numpy(alive), every, scanner=Scanner(level))
        alone = [
            choose(row[None], [each], scanner=Scanner(level, 1))[0]
            for row, each in zip(torch.from_numpy(alive), every, strict=True)
        ]
        assert together == alone


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_logit_that_its_temperature_makes_infinite_is_chosen_all_the_same() -> None:
    logits = torch.tensor([[1.0, 3e20, 2.0]])
    row = Row(resolve({"seed": 1, "temperature": 1e-30}), [1], 1)
    assert choose(logits, [replace(row)], scanner=Scanner()) == choose(logits, [row])


def test_rows_that_ask_for_a_token_alone_are_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual settings are; what needs a stage of another kind is not, nor what is told more of."""
    drawn: list[int] = []
    at_once = Scan.drawn
    monkeypatch.setattr(Scan, "drawn", lambda self, *given: drawn.append(len(self)) or at_once(self, *given))
    usual, others = (
        [{}, {"top_k": 40}, {"top_p": 0.9, "min_p": 0.1, "temperature": 0.2}],
        [{"typical_p": 0.5}, {"banned_token_ids": [1]}],
    )
    for given_parameters in (*usual, *others, {"logprobs": 0}, {"trace": True}, {"temperature": 0}):
        choose(WIDE[:1], [Row(resolve({"seed": 1, **given_parameters}), [1], 1)], scanner=Scanner())
    assert drawn == [1] * len(usual)


@pytest.mark.parametrize("asked", [{}, {"top_k": 5}, {"presence_penalty": 1.0}, {"logprobs": 1}], ids=str)
def test_a_greedy_row_chooses_the_likeliest_whatever_it_wants_to_know(asked: dict) -> None:
    rows = [Row(resolve({"temperature": 0, **asked}), list(HISTORY), PROMPT_LENGTH) for _ in WIDE]
    plain, fast = choose(WIDE, [replace(row) for row in rows]), choose(WIDE, rows, scanner=Scanner())
    assert [choice.token_id for choice in fast] == [choice.token_id for choice in plain]
    assert [choice.rank for choice in fast] == [choice.rank for choice in plain]
    for bad in (math.nan, math.inf, -math.inf):
        damaged = WIDE.clone()
        damaged[1] = bad
        with pytest.raises(UnusableLogits) as caught:
            choose(damaged, [replace(row) for row in rows], scanner=Scanner())
        assert caught.value.rows == (1,)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**53 - 1), st.integers(0, 5), st.sampled_from(EVERY_STRATEGY))
def test_a_scanned_row_chooses_the_same_alone_and_among_others(seed: int, at: int, strategy: tuple) -> None:
    some = torch.randn(6, 3001, generator=torch.Generator().manual_seed(seed % 1000)) * 2
    parameters = resolve({"seed": seed, "logprobs": 3, **strategy[1]}, vocabulary=Marked())
    rows = [
        Row(resolve({"seed": n, **EVERY_STRATEGY[n * 5][1]}, vocabulary=Marked()), list(HISTORY), PROMPT_LENGTH)
        for n in range(6)
    ]
    rows[at] = Row(parameters, list(HISTORY), PROMPT_LENGTH)
    alone = choose(some[at : at + 1], [Row(parameters, list(HISTORY), PROMPT_LENGTH)], scanner=Scanner(threads=1))[0]
    before = some.clone()
    assert choose(some, rows, scanner=Scanner(threads=2))[at] == alone
    assert torch.equal(some, before), "the network's logits are left as they are"


def test_an_engine_scans_where_the_core_computes() -> None:
    model = tiny_model("llama")
    assert DecoderNetwork(model, 2).scanner is None
    native.hold(model, "float32")
    assert isinstance(DecoderNetwork(model, 2).scanner, Scanner)


def test_a_step_looks_through_its_logits_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it finds then is what is found of the same logits afterwards, in whatever order they are asked for."""
    model = tiny_model("llama")
    native.hold(model, "int8", threads=2)
    cache = SlotCache(model, 4)
    works = [Work(0, 0, [1, 2, 3], wanted=2), Work(1, 0, [5], wanted=0), Work(2, 0, [7, 8]), Work(3, 0, [9])]
    rows = [row for output in outputs(model, cache, works) for row in output.logits]
    assert len(rows) == 4 and model.core is not None
    expected = Scanner()([row.clone() for row in rows[::-1]])
    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "_blank", None)
        ready = model.core.scanner(rows[::-1])
    assert (ready.best == expected.best).all() and (ready.first == expected.first).all()
    for one, other in zip(ready.totals(), expected.totals(), strict=True):
        assert one.tobytes() == other.tobytes()
    # A later step's are others, also where only some of the rows are.
    later = outputs(model, cache, [Work(3, 1, [4])])[0].logits[0]
    assert model.core.scanner([later, rows[0]]).best.tolist() == [float(later.max()), float(rows[0].max())]
