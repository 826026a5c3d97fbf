"""`topkapi bench`: what it measures, how it is asked, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import skip_without_int8
from topkapi.model.quantize import Int8Product
from topkapi.service.commands.bench import STRATEGIES, Decoding, Figure, Instant, Shape, decode
from topkapi.service.commands.bench_model import VOCABULARY, random_checkpoint
from topkapi.service.commands.cli import main
from topkapi.service.models import LoadedModel, Models
from topkapi.service.settings import Settings


def test_the_budget_of_a_step_is_the_engines() -> None:
    from topkapi.engine import engine
    from topkapi.service.commands import bench_shape

    assert bench_shape.STEP_TOKENS == engine.STEP_TOKENS


SMALL = ["--streams", "3", "--tokens", "8", "--prompt-tokens", "5", "--repeats", "2"]
FIGURES = {
    "single_tokens_per_s", "streams_tokens_per_s", "ratio", "mixed_tokens_per_s", "single_step_ms", "streams_step_ms",
    "mixed_step_ms", "prefill_tokens_per_s", "first_token_ms", "streams_first_token_ms", "outside_share",
    "service_share",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("measured", context=1024)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[LoadedModel]:
    models = Models(Settings.read())
    yield models.load(str(checkpoint))
    models.close()


def test_json_holds_every_figure(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(checkpoint), "--json", "--dtype", "bfloat16", *SMALL, "--tokens", "400"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["model"], result["dtype"], result["streams"], result["tokens"]) == ("measured", "bfloat16", 3, 400)
    assert (result["prompt_tokens"], result["repeats"], result["deterministic"]) == (5, 2, True)
    assert result["figures"].keys() == FIGURES
    for name, figure in result["figures"].items():
        assert 0 < figure["least"] <= figure["median"] <= figure["greatest"], name
    assert result["figures"]["outside_share"]["greatest"] < 1


def test_the_table_says_what_was_measured(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Long enough that there is a stretch in which every stream generates, on a busy machine too.
    assert main(["bench", str(checkpoint), *SMALL, "--tokens", "400"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "measured: " in lines[0] and "(float32)" in lines[0]
    assert lines[1] == "5 prompt tokens, 400 generated, 2 repeats"
    assert any(line.startswith("3 streams / single stream") and line.endswith("times") for line in lines)
    assert any("outside the network" in line and line.endswith("% of the step") for line in lines)


def test_only_the_stretch_with_every_stream_counts(model: LoadedModel) -> None:
    """All have begun and none has ended: between two moments, so that prompts and stragglers are left out."""
    shape = Shape(streams=4, tokens=12, prompt_tokens=9)
    found = asyncio.run(decode(model, shape, 4, list(STRATEGIES.values()), seed=5))
    assert len(found.first_token_s) == 4
    assert found.begun is not None and found.ended is not None
    counted = found.ended.tokens - found.begun.tokens
    assert 4 <= counted <= 4 * 11
    assert counted <= 4 * (found.ended.steps - found.begun.steps) + 4


def test_figures_are_differences() -> None:
    begun, ended = Instant(10.0, 1.0, 4.0, 3, 100), Instant(12.0, 1.1, 5.5, 13, 420)
    found = Decoding([], begun, ended)
    assert found.tokens_per_s == 160
    assert found.step_ms == 200
    assert found.outside_share == pytest.approx(0.25)
    assert found.service_share == pytest.approx(0.05)
    assert Figure.of([3.0, 1.0, 8.0]) == Figure(3.0, 1.0, 8.0)


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--streams", "0"], "--streams must be at least 1, not 0"),
        (["--tokens", "3"], "--tokens must be at least 8, not 3"),
        (["--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--tokens", "1500"], "do not fit the context of 1024 tokens"),
        (["--streams", "33", "--prompt-tokens", "9"], "computes up to 32 requests together, not 33"),
        (["--dtype", "int8", "--threads", "0"], "--threads"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    checkpoint: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(checkpoint), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_without_a_checkpoint_it_is_gpt2s_shape_with_random_weights() -> None:
    skip_without_int8()
    checkpoint = random_checkpoint(torch.int8)
    assert checkpoint.config.parameter_count() == 124_439_808
    assert checkpoint.tokenizer.vocab_size == VOCABULARY
    text = "Ground control to Major Tom"
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode(text)) == text
    assert isinstance(checkpoint.model.lm_head.product, Int8Product)
    text_ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    logits = checkpoint.model(text_ids, torch.arange(40)[None])
    entropy = torch.distributions.Categorical(logits=logits[0]).entropy().mean()
    assert 3 < entropy < 4, "as uncertain as a trained network"


def test_what_so_few_tokens_do_not_tell_is_said_to_be_unmeasured(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stream has ended before the last one has begun: there is no stretch with all of them."""
    early, late = Instant(10.0, 1.0, 4.0, 3, 100), Instant(12.0, 1.1, 5.5, 13, 420)
    assert Decoding([], early, late).measured
    assert not Decoding([], late, early).measured
    assert not Decoding([], early, Instant(10.1, 1.0, 4.1, 5, 110)).measured
    assert not Decoding([], early).measured

    async def short(model: LoadedModel, shape: Shape, streams: int, *more: object, **options: object) -> Decoding:
        return Decoding([0.5] * streams, late, early) if streams > 1 else Decoding([0.5], early, late)

    monkeypatch.setattr("topkapi.service.commands.bench.decode", short)
    assert main(["bench", str(checkpoint), *SMALL, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures.keys() == set(FIGURES)
    unmeasured = {name for name, figure in figures.items() if figure is None}
    assert unmeasured == FIGURES - {
        "single_tokens_per_s", "single_step_ms", "prefill_tokens_per_s", "first_token_ms", "streams_first_token_ms"
    }  # fmt: skip
    assert main(["bench", str(checkpoint), *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("step, 3 streams") and line.endswith("not measured") for line in lines)
    assert lines[-1].startswith("not measured: in 8 tokens") and "--tokens" in lines[-1]


def test_it_says_how_far_it_is_and_how_long_it_will_take(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(checkpoint), *SMALL]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["loading", "warming up"] and told[2] == "repeat 1 of 2"
    assert told[3].startswith("repeat 1 of 2, less than ") and told[4].startswith("repeat 2 of 2, about ")
    assert main(["bench", str(checkpoint), *SMALL, "--json"]) == 0
    assert capsys.readouterr().err == ""
