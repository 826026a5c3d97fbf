"""`topkapi dpo`: the paper's loss to the digit, its gradient, every bad row named, and runs that resume exactly."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tests.training.test_resume import assert_resumes_to_the_same
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.transformer import Decoder
from topkapi.service.commands.cli import main
from topkapi.training.data.instructions import Example
from topkapi.training.data.preferences import Pair, PairLoader, encode_preferences, read_preferences
from topkapi.training.tuning.dpo import Preferred, dpo_loss

ASK = {"role": "user", "content": "Why?"}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_the_loss_of_a_pair_by_hand() -> None:
    """The chosen answer gained 1/2 and the rejected one lost 1/2: z = 0.1 * 1, -log sigmoid(0.1) = log(1 + e^-0.1)."""
    policy, reference = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]])
    loss, margin = dpo_loss(policy, reference, 0.1, 0.0)
    assert margin.item() == pytest.approx(0.1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1))) == pytest.approx(0.644397, abs=1e-6)
    smoothed, _ = dpo_loss(policy, reference, 0.1, 0.2)
    assert smoothed.item() == pytest.approx(0.8 * 0.644397 + 0.2 * 0.744397, abs=1e-6)
    assert dpo_loss(reference, reference, 0.1, 0.3)[0].item() == pytest.approx(math.log(2))


@pytest.fixture
def loader() -> PairLoader:
    """Pairs of answers of unlike lengths, with made-up reference log-probabilities."""
    generator = torch.Generator().manual_seed(0)

    def example(length: int) -> Example:
        ids = torch.randint(1, 120, (4 + length,), generator=generator).tolist()
        return Example(ids, [False] * 4 + [True] * length, "here")

    loader = PairLoader([Pair(example(2 + n), example(7 - n)) for n in range(4)], batch_size=4, seed=0)
    loader.reference = -10 * torch.rand(4, 2, generator=generator) - 15
    return loader


def plain_loss(model: Decoder, loader: PairLoader, beta: float, smoothing: float) -> torch.Tensor:
    """DPO as the paper writes it, text by text, differentiated by autograd as a whole."""

    def answer_log_probability(example: Example) -> torch.Tensor:
        ids = torch.tensor([example.token_ids])
        log_probabilities = model(ids, torch.arange(ids.shape[1]).unsqueeze(0))[0].log_softmax(-1)
        return sum(log_probabilities[at - 1, ids[0, at]] for at, each in enumerate(example.trained) if each)

    losses = []
    for pair, (chosen, rejected) in zip(loader.pairs, loader.reference, strict=True):
        gained = answer_log_probability(pair.chosen) - chosen
        z = beta * (gained - (answer_log_probability(pair.rejected) - rejected))
        losses.append(-((1 - smoothing) * z.sigmoid().log() + smoothing * (-z).sigmoid().log()))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_the_gradient_is_autograds_however_the_batch_is_cut(micro_batch_size: int | None, loader: PairLoader) -> None:
    model = tiny_model("llama").requires_grad_()
    batch = loader.batch(0)
    expected = plain_loss(model, loader, 0.3, 0.1)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    objective = Preferred(0.3, 0.1)
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "compiled": None}
    assert batch.weight() == 4
    assert objective.backward(model, batch, divisor=4, **options) == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        found, wanted = parameter.grad, gradients[name]
        assert found is not None and wanted is not None
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())), name
    measured = objective.evaluate(model, loader.first(None), micro_batch_size)
    assert measured["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= measured["accuracy"] <= 1


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": [ASK], "chosen": [answer("So.")], "rejected": [answer("No.")]},
        {"chosen": [ASK, answer("So.")], "rejected": [ASK, answer("No.")]},
    ],
    ids=["texts", "messages", "conversations"],
)
def test_every_format_gives_the_same_pair(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (pair,) = read_preferences(path)
    assert pair.prompt() == [ASK]
    assert [each.messages[-1] for each in (pair.chosen, pair.rejected)] == [answer("So."), answer("No.")]


BAD_ROWS = {
    "no rejected": ({"prompt": "a", "chosen": "b"}, "row 2: no field 'rejected'"),
    "empty": ({"prompt": "a", "chosen": "b", "rejected": " "}, "row 2, rejected: the answer is empty"),
    "same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "row 2: chosen and rejected are the same"),
    "number": ({"prompt": "a", "chosen": 3, "rejected": "b"}, "row 2: 'chosen' is neither a text nor a list"),
    "no prompt": ({"chosen": "b", "rejected": "c"}, "row 2: there is no prompt"),
    "other prompt": (
        {"chosen": [ASK, answer("b")], "rejected": [{**ASK, "content": "How?"}, answer("c")]},
        "row 2: chosen and rejected answer different prompts",
    ),
    "a question": ({"prompt": "a", "chosen": [ASK], "rejected": "b"}, "the last message must be the assistant's"),
    "not an object": ("text", "row 2: not an object"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(kind: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[kind]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}, row]))
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert message in caught.value.message


def test_only_the_last_answers_count(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    prompt = [ASK, answer("Because."), ASK]
    path.write_text(json.dumps([{"prompt": prompt, "chosen": "So.", "rejected": "No, no, no. " * 9}]))
    chat = ChatTemplate.built_in("chatml")
    ((pair,), dropped) = encode_preferences(read_preferences(path), tiny_tokenizer, chat, longest=200)
    trained = [token for token, each in zip(pair.chosen.token_ids, pair.chosen.trained, strict=True) if each]
    assert tiny_tokenizer.decode(trained) == "So.<|im_end|>" and dropped == []
    with pytest.raises(DataError, match="row 1, rejected"):
        encode_preferences(read_preferences(path), tiny_tokenizer, chat, longest=60)
    none, dropped = encode_preferences(read_preferences(path), tiny_tokenizer, chat, longest=60, drop_overlong=True)
    assert none == [] and dropped == [f"{path}, row 1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preferences") / "pairs.json"
    path.write_text(
        json.dumps([{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"{n}, is it?"} for n in range(20)])
    )
    return path


FLAGS = "--batch-size 4 --max-steps 6 --sample-tokens 3 --threads 1 --evaluate-every 2 --save-every 3 --dropout 0.1"


def command(base: Path, rows: Path, out: Path, *flags: str) -> list[str]:
    return ["dpo", "--checkpoint", str(base), "--data", str(rows), "--out", str(out), *FLAGS.split(), *flags]


@pytest.mark.parametrize("method", ["full", pytest.param("qlora", marks=pytest.mark.slow)])
def test_a_run_learns_the_preference_and_resumes_to_the_same_bytes(
    method: str,
    tiny_checkpoint: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_checkpoint("base")
    flags = ["--method", method, "--learning-rate", "0.003" if method == "full" else "0.03"]
    assert main(command(base, rows, tmp_path / "whole", *flags)) == 0
    assert load_checkpoint(tmp_path / "whole" / "best").details["made_by"] == "topkapi dpo"
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "validation_loss" in record]
    # Nothing has moved before the first step: every z is zero.
    assert evaluations[0]["validation_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[0]["validation_margin"] == pytest.approx(0, abs=1e-6)
    assert evaluations[-1]["validation_loss"] < 0.6 and evaluations[-1]["validation_accuracy"] == 1.0
    assert "accuracy 1.000  margin" in capsys.readouterr().out
    resumed = tmp_path / "resumed"
    assert_resumes_to_the_same(command(base, rows, resumed, *flags), resumed, tmp_path / "whole", monkeypatch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta must be a number above 0"),
        (["--label-smoothing", "0.5"], "--label-smoothing must be a number of at least 0 and below 0.5"),
        (["--z-loss", "0.1"], "the loss of preferences has no z-loss"),
        (["--batch-size", "99"], "18 training pairs (2 more held out for validation) do not fill one batch of 99"),
    ],
)
def test_settings_that_cannot_apply_are_refused(
    flags: list[str],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command(tiny_checkpoint("base"), rows, tmp_path / "run", *flags)) == 2
    assert message in capsys.readouterr().err
