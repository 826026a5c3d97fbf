"""Mixtures keep their shares and can begin anywhere; documents that repeat others are left out."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.training.planning.test_measuring import SMALL, documents, sentences
from topkapi.model.errors import DataError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.training.data import shards
from topkapi.training.data.duplicates import repeated, signature
from topkapi.training.data.mixing import mixed_order, quotas
from topkapi.training.data.shards import TokenData, prepare_tokens
from topkapi.training.data.weights import sources_and_weights
from topkapi.training.data.windows import WindowLoader


def test_weights_are_told_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd=3").write_text("a file that is called so")
    assert sources_and_weights(["a.txt=3", "b.txt"]) == (["a.txt", "b.txt"], [3.0, 1.0])
    assert sources_and_weights(["odd=3", "b.txt", "c=d"]) == (["odd=3", "b.txt", "c=d"], None)
    for wrong in ("a.txt=0", "a.txt=-1", "a.txt=1e999"):
        with pytest.raises(DataError, match="must be above 0"):
            sources_and_weights([wrong, "b"])
    with pytest.raises(DataError, match="alone means nothing"):
        sources_and_weights(["a.txt=2"])


parts = st.lists(st.tuples(st.integers(1, 40), st.floats(0.1, 10)), min_size=1, max_size=4)


@given(parts, st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_an_epoch_has_every_sources_share(parts: list[tuple[int, float]], seed: int, epoch: int) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    order = mixed_order(seed, epoch, sizes, weights)
    assert len(order) == sum(sizes)
    of = np.searchsorted(np.cumsum(sizes), order, side="right")
    found = [int((of == number).sum()) for number in range(len(sizes))]
    assert found == quotas(sum(sizes), weights)
    assert all(
        abs(count - len(order) * weight / sum(weights)) < 1 for count, weight in zip(found, weights, strict=True)
    )
    assert np.array_equal(order, mixed_order(seed, epoch, sizes, weights))


@given(parts, st.integers(0, 2**32))
def test_nothing_comes_again_before_all_of_its_source_have_come(parts: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    seen = Counter(np.concatenate([mixed_order(seed, epoch, sizes, weights) for epoch in range(4)]).tolist())
    offset = 0
    for size in sizes:
        counts = [seen[item] for item in range(offset, offset + size)]
        assert max(counts) - min(counts) <= 1
        offset += size


def test_windows_of_a_mixture_stay_within_their_source() -> None:
    stream = np.concatenate([np.arange(0, 50), np.arange(100, 170), np.arange(200, 230)]).astype(np.uint16)

    def make() -> WindowLoader:
        return WindowLoader(
            stream, context=8, stride=8, batch_size=4, seed=5, parts=[50, 70, 30],
            order=lambda epoch, sizes: mixed_order(5, epoch, sizes, [4.0, 1.0, 2.0]),
        )  # fmt: skip

    loader = make()
    assert loader.parts == [6, 8, 3]
    steps = 3 * loader.steps_per_epoch
    rows = torch.cat([loader.batch(step).tokens for step in range(steps)])
    assert torch.equal(rows - rows[:, :1], torch.arange(8).expand_as(rows)), "no window crosses a border"
    share = Counter((rows[:, 0] // 100).tolist())
    assert share[0] > 1.5 * share[2] > 1.5 * share[1]
    # Beginning anywhere gives the same batch: exact resuming in the middle of an epoch rests on it.
    assert torch.equal(make().batch(steps - 2).tokens, loader.batch(steps - 2).tokens)
    assert loader.origins(0) and "tokens" in loader.origins(0)[0]


def run(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments)])


def test_a_recipe_mixes_by_weights(tmp_path: Path, english: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documents(tmp_path / "a.jsonl", *sentences(english, 20))
    documents(tmp_path / "b.jsonl", *sentences(english, 40))
    given = [*SMALL, "--cache", "cache", "--max-steps", "3", "--sample-every", "never", "--overwrite"]
    assert run("pretrain", "--data", "a.jsonl=3", "b.jsonl=1", *given, "--out", "flags") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("75.0% from a.jsonl" in line or "25.0% from b.jsonl" in line for line in lines) == 2
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump({"data": {"a.jsonl": 3, "b.jsonl": 1}}))
    assert run("pretrain", "mixed.yaml", *given, "--out", "recipe") == 0
    one, other = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("flags", "recipe"))
    assert one == other
    capsys.readouterr()
    documents(tmp_path / "c.jsonl", "short", "shorter")
    assert run("pretrain", "--data", "a.jsonl=3", "c.jsonl=1", *given, "--out", "short") == 2
    assert "c.jsonl=1 does not fill one window of 16 tokens" in capsys.readouterr().err
    assert run("pretrain", "--data", "a.jsonl=3", "a.jsonl=1", *given, "--out", "twice") == 2
    assert "belongs to two sources" in capsys.readouterr().err


def test_instructions_are_mixed_too(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from topkapi.training.data.instructions import ExampleLoader

    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 8), ("b", 24)):
        rows = [{"prompt": f"{name}{number}", "completion": name} for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    batches: dict[int, list[str]] = {}
    batch = ExampleLoader.batch

    def seen_batch(self: ExampleLoader, step: int) -> Any:
        batches[step] = self.origins(step)
        return batch(self, step)

    monkeypatch.setattr(ExampleLoader, "batch", seen_batch)
    given = ["--checkpoint", tiny_checkpoint("mixed", context=64), "--batch-size", "4", "--validation-fraction", "0",
             "--epochs", "1", "--sample-every", "never", "--overwrite"]  # fmt: skip
    assert run("finetune", "--data", "a.json=3", "b.json=1", *given) == 0
    seen = [origin for origins in batches.values() for origin in origins]
    assert Counter(origin.partition(",")[0] for origin in seen) == {"a.json": 24, "b.json": 8}
    assert set(Counter(seen).values()) == {1, 3}, "each of a three times, some of b once"
    assert run("dpo", "--data", "a.json=3", "b.json=1", *given) == 2
    assert "not mixed by weights" in capsys.readouterr().err


@pytest.fixture
def prepare(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Callable[..., TokenData]:
    def call(files: list[Path], validation: list[Path] | None = None, **options: Any) -> TokenData:
        return prepare_tokens(files, validation or [], tiny_tokenizer, cache=tmp_path / "cache", **options)

    return call


def texts_of(stream: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    text = tokenizer.decode(stream.tolist())
    return text.removesuffix("<|endoftext|>").split("<|endoftext|>") if text else []


def test_exact_copies_are_left_out(
    prepare: Callable[..., TokenData], tiny_tokenizer: Tokenizer, tmp_path: Path, english: str
) -> None:
    texts = sentences(english, 12)
    first = documents(tmp_path / "a.jsonl", *texts[:8], texts[2])
    second = documents(tmp_path / "b.jsonl", texts[0], *texts[8:], texts[8], texts[3].upper())
    data = prepare([first, second], validation_fraction=0.2, deduplicate="exact")
    assert data.info["repeated_documents"] == 3
    kept = [*texts_of(data.train, tiny_tokenizer), *texts_of(data.validation, tiny_tokenizer)]
    assert sorted(kept) == sorted([*texts, texts[3].upper()])
    assert len(prepare([first, second], validation_fraction=0.2).train_documents) > len(data.train_documents)


def test_what_is_held_out_is_left_out_of_training(
    prepare: Callable[..., TokenData], tiny_tokenizer: Tokenizer, tmp_path: Path, english: str
) -> None:
    texts = sentences(english, 6)
    train, held_out = documents(tmp_path / "a.jsonl", *texts), documents(tmp_path / "b.jsonl", texts[1], "other")
    data = prepare([train], [held_out], deduplicate="exact")
    assert texts_of(data.train, tiny_tokenizer) == [texts[0], *texts[2:]]
    assert texts_of(data.validation, tiny_tokenizer) == [texts[1], "other"]


def test_sentences_stand_alone_in_what_is_trained(
    prepare: Callable[..., TokenData], tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        f'# Part {number}\n\nMr. Brown saw {number} old houses. "Whose are they?" he asked.\nNobody knew it there. No.'
        for number in range(6)
    ]
    files = [documents(tmp_path / "a.jsonl", *texts[:3]), documents(tmp_path / "b.jsonl", *texts[3:])]
    plain = prepare(files, validation_fraction=0.2, groups=[1, 1])
    data = prepare(files, validation_fraction=0.2, groups=[1, 1], alone=1.0)
    assert np.array_equal(data.validation, plain.validation)
    rest = Counter(texts_of(data.train, tiny_tokenizer)) - Counter(whole := texts_of(plain.train, tiny_tokenizer))
    expected: Counter[str] = Counter()
    for text in whole:
        expected.update([text.split("\n")[2].split(' "')[0], '"Whose are they?" he asked.', "Nobody knew it there."])
    assert rest == expected
    # The sentences of a file count as its source's, and as one document.
    assert sum(data.info["train_parts"]) == len(data.train)
    assert len(data.train_documents) == len(whole) + 2
    less = prepare(files, validation_fraction=0.2, alone=0.5)
    assert len(plain.train) < len(less.train) < len(data.train)
    monkeypatch.setattr(shards, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(shards, "_FORMAT", -1)
    assert np.array_equal(prepare(files, validation_fraction=0.2, alone=0.5).train, less.train)
    with pytest.raises(DataError, match="several documents, and here is one") as caught:
        prepare([documents(tmp_path / "c.jsonl", texts[0])], alone=0.5)
    assert "--lone-sentences" in (caught.value.hint or "")


def nearly(text: str, changes: int, seed: int = 0) -> str:
    words = text.split()
    for at in random.Random(seed).sample(range(len(words)), changes):
        words[at] = "changed"
    return " ".join(words)


def test_near_copies_are_left_out(
    prepare: Callable[..., TokenData], tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One word in 200 changes 5 of 196 runs of five words; 20 change nearly half of them."""
    pytest.importorskip("datasketch", reason="the deduplicate extra is not installed")
    texts = [" ".join(sentences(english, 40)[4 * number : 4 * number + 4]) for number in range(8)]
    texts += [nearly(texts[0], 1), nearly(texts[1], 20), texts[2].upper() + "!"]
    assert repeated(range(11), [signature(text) for text in texts]).tolist() == [False] * 8 + [True, False, True]
    files = [documents(tmp_path / "a.jsonl", *texts[:6]), documents(tmp_path / "b.jsonl", *texts[6:])]
    data = prepare(files, validation_fraction=0.1, deduplicate="near")
    assert data.info["repeated_documents"] == 2
    assert data.info["train_documents"] + data.info["validation_documents"] == 9
    monkeypatch.setattr(shards, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(shards, "_FORMAT", -1)
    assert np.array_equal(prepare(files, validation_fraction=0.1, deduplicate="near").train, data.train)


def test_near_copies_without_the_package_say_what_to_install(
    prepare: Callable[..., TokenData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(DataError, match="needs the package datasketch") as caught:
        prepare([documents(tmp_path / "a.jsonl", "a", "b")], deduplicate="near")
    assert "topkapi[deduplicate]" in (caught.value.hint or "")


def test_a_source_that_has_nothing_left_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtures elsewhere take a row of the next source for it, or fail on an index (datasets' issue 8626)."""
    rows = {"long": ["word " * 400] * 4, "short": [f"word {number}" for number in range(8)]}
    for name, questions in rows.items():
        lines = [json.dumps({"prompt": text, "completion": "Yes."}) for text in questions]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = [f"{tmp_path / name}.jsonl=1" for name in rows]
    checkpoint = str(tiny_checkpoint("parent", context=64))
    command = ["finetune", "--checkpoint", checkpoint, "--out", str(tmp_path / "run"), "--data", *data]
    assert main([*command, "--batch-size", "2", "--on-overlong", "drop", "--validation-fraction", "0"]) == 2
    assert "long.jsonl has no example left to train on" in capsys.readouterr().err
