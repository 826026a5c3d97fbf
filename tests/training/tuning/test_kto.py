"""`topkapi kto`: the loss of the paper and of TRL, its gradient, every bad row named, and runs that resume exactly."""

import json
import math
from collections.abc import Callable, Sequence
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
from topkapi.training.data.verdicts import (
    Answer,
    VerdictBatch,
    VerdictLoader,
    encode_verdicts,
    mismatched,
    read_verdicts,
)
from topkapi.training.tuning.kto import Judged

ASK = {"role": "user", "content": "Why?"}
ROWS = [
    # Prompt, completion with its end token, label.
    ([5, 7, 11], [9, 3, 0], True),
    ([8, 2], [14, 90, 33, 0], False),
    ([61, 62, 63, 64], [65, 0], True),
    ([100, 7], [42, 43, 44, 45, 46, 0], True),
    ([19, 20, 21], [22, 0], False),
    ([70], [71, 72, 73, 0], True),
]
WEIGHTS = (1.3, 0.7)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def loader_of(rows: Sequence[tuple[list[int], list[int], bool]], reference: Decoder | None = None) -> VerdictLoader:
    """One batch of `rows`, with the log-probabilities that `reference` gives."""
    answers = [
        Answer(Example(prompt + said, [False] * len(prompt) + [True] * len(said), "here"), label)
        for prompt, said, label in rows
    ]
    loader = VerdictLoader(answers, batch_size=len(rows), seed=0, longest=64)
    if reference is not None:
        texts = zip(loader.examples, loader.mismatched, strict=True)
        loader.reference = torch.tensor([[log_probability(reference, each).item() for each in pair] for pair in texts])
    return loader


def log_probability(model: Decoder, example: Example) -> torch.Tensor:
    ids = torch.tensor([example.token_ids])
    log_probabilities = model(ids, torch.arange(ids.shape[1]).unsqueeze(0))[0].log_softmax(-1)
    return sum(log_probabilities[at - 1, ids[0, at]] for at, each in enumerate(example.trained) if each)


def plain_loss(model: Decoder, loader: VerdictLoader, beta: float) -> torch.Tensor:
    """KTO as the paper writes it, text by text, differentiated by autograd as a whole."""
    gains = [log_probability(model, each) for each in loader.examples]
    with torch.no_grad():
        others = torch.stack([log_probability(model, each) for each in loader.mismatched])
        z = (others - loader.reference[:, 1]).mean().clamp(min=0)
    losses = []
    for gain, before, good in zip(gains, loader.reference[:, 0], loader.desirable, strict=True):
        value = torch.sigmoid(beta * (gain - before - z)) if good else torch.sigmoid(beta * (z - gain + before))
        losses.append(WEIGHTS[0 if good else 1] * (1 - value))
    return torch.stack(losses).mean()


def test_the_loss_of_an_answer_by_hand() -> None:
    """The good answer gained 2, the bad one lost 1, z is 1/2: m = 0.2 * 1.5 and 0.2 * 1.5."""
    batch = loader_of(ROWS[:2]).batch(0)
    assert isinstance(batch, VerdictBatch)
    order = [bool(each) for each in batch.desirable]
    policy = torch.tensor([2.0 if good else -1.0 for good in order])
    loss, margin = Judged(0.2, 1.0, 0.5).loss(policy, batch, 0.5)
    assert margin.tolist() == pytest.approx([0.3, 0.3])
    expected = 1 - 1 / (1 + math.exp(-0.3))
    assert loss.tolist() == pytest.approx([expected if good else expected / 2 for good in order])


# TRL 1.16.0 with transformers 5.23: `tiny_model("llama", seed=1)` and `tiny_model("llama")` saved and opened by
# LlamaForCausalLM as `model` and `ref_model` of KTOTrainer (beta 0.2, the weights above, one batch of six), a
# vocabulary of words for the ids of ROWS, dropout none; `trainer.compute_loss` of its first batch and its metric `kl`.
# Then both models the other way round.
TRL = {(1, 0): (0.5318647027, 0.2342203408), (0, 1): (0.5754368901, 0.0)}


@pytest.mark.parametrize("seeds", TRL)
@pytest.mark.parametrize("micro_batch_size", [None, 1, 4])
def test_the_loss_is_trls(seeds: tuple[int, int], micro_batch_size: int | None) -> None:
    policy, reference = (tiny_model("llama", seed) for seed in seeds)
    loader = loader_of(ROWS, reference)
    objective = Judged(0.2, *WEIGHTS)
    loss, kl = TRL[seeds]
    measured = objective.evaluate(policy, loader.first(None), micro_batch_size)
    assert (measured["loss"], measured["kl"]) == pytest.approx((loss, kl), abs=1e-5)
    policy.requires_grad_()
    found = objective.backward(policy, loader.batch(0), divisor=6, micro_batch_size=micro_batch_size)
    assert found == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 1, 4])
def test_the_gradient_is_autograds_however_the_batch_is_cut(micro_batch_size: int | None) -> None:
    model = tiny_model("llama", 1).requires_grad_()
    loader = loader_of(ROWS, tiny_model("llama"))
    expected = plain_loss(model, loader, 0.05)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    objective, batch = Judged(0.05, *WEIGHTS), loader.batch(0)
    assert batch.weight() == 6
    found = objective.backward(model.train(), batch, divisor=6, micro_batch_size=micro_batch_size)
    assert found == pytest.approx(expected.item(), rel=1e-5) and model.training
    for name, parameter in model.named_parameters():
        got, wanted = parameter.grad, gradients[name]
        assert got is not None and wanted is not None
        assert torch.allclose(got, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max())), name


def test_the_other_answer_is_to_another_prompt() -> None:
    def example(prompt: list[int], said: list[int]) -> Example:
        return Example([*prompt, *said, 0], [False] * len(prompt) + [True] * len(said) + [False], "here")

    rows = [example([1, 2], [10]), example([1, 2], [11]), example([3], [12, 13]), example([1, 2], [14])]
    assert [each.token_ids for each in mismatched(rows, 64)] == [
        [1, 2, 12, 13, 0], [1, 2, 12, 13, 0], [3, 11, 0], [1, 2, 12, 13, 0],
    ]  # fmt: skip
    assert mismatched(rows, 64)[0].trained == [False, False, True, True, False]
    assert [len(each.token_ids) for each in mismatched(rows, 2)] == [3, 3, 3, 3]
    alike = [example([1], [number]) for number in (10, 11, 12)]
    assert [each.token_ids[1] for each in mismatched(alike, 64)] == [12, 10, 11]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "completion": "So.", "label": True},
        {"prompt": [ASK], "completion": [answer("So.")], "label": 1},
        {"messages": [ASK, answer("So.")], "label": True},
        {"instruction": "Why?", "output": "So.", "label": True},
    ],
    ids=["texts", "messages", "conversation", "instruction"],
)
def test_every_format_gives_the_same_answer(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (found,) = read_verdicts(path, input_heading=False)
    assert found.conversation.messages == [ASK, answer("So.")] and found.desirable
    path.write_text(json.dumps(row | {"label": False}))
    assert not read_verdicts(path, input_heading=False)[0].desirable


def test_a_table_and_a_pair_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion,label\nWhy?,So.,True\nWhy?,No.,false\n")
    found = read_verdicts(tmp_path / "rows.csv", input_heading=False)
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "Why?", "chosen": "So.", "rejected": "No."}]))
    paired = read_verdicts(tmp_path / "rows.json", input_heading=False)
    for verdicts in (found, paired):
        assert [(each.conversation.messages[-1]["content"], each.desirable) for each in verdicts] == [
            ("So.", True), ("No.", False),
        ]  # fmt: skip
    assert len({each.conversation.origin for each in paired}) == 2


BAD_ROWS = {
    "no label": ({"prompt": "a", "completion": "b"}, "row 2: no label"),
    "a word": ({"prompt": "a", "completion": "b", "label": "good"}, "the label 'good' is neither true nor false"),
    "a score": ({"prompt": "a", "completion": "b", "label": 0.5}, "the label 0.5 is neither true nor false"),
    "empty": ({"prompt": "a", "completion": " ", "label": True}, "row 2: the answer is empty"),
    "not trained": (
        {"messages": [ASK, answer("a"), ASK, answer("b") | {"weight": 0}], "label": True},
        "row 2: the last answer has the weight 0",
    ),
    "both": ({"prompt": "a", "chosen": "b", "rejected": "c", "label": True}, "'label' can't be used"),
    "not an object": ("text", "row 2: not an object"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(kind: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[kind]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b", "label": True}, row]))
    with pytest.raises(DataError) as caught:
        read_verdicts(path, input_heading=False)
    assert message in caught.value.message


def test_only_the_last_answer_counts(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [ASK, answer("Because."), ASK, answer("So.")], "label": False}]))
    chat = ChatTemplate.built_in("chatml")
    verdicts = read_verdicts(path, input_heading=False)
    ((found,), dropped) = encode_verdicts(verdicts, tiny_tokenizer, chat, longest=200)
    marked = zip(found.example.token_ids, found.example.trained, strict=True)
    assert tiny_tokenizer.decode([token for token, each in marked if each]) == "So.<|im_end|>" and dropped == []
    none, dropped = encode_verdicts(verdicts, tiny_tokenizer, chat, longest=20, drop_overlong=True)
    assert none == [] and dropped == [f"{path}, row 1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verdicts") / "labelled.json"
    labelled = [
        {"prompt": f"Say {n}.", "completion": f"It is {n}." if n % 2 else f"{n}, is it?", "label": n % 2 == 1}
        for n in range(20)
    ]
    path.write_text(json.dumps(labelled))
    return path


FLAGS = "--batch-size 4 --max-steps 6 --sample-tokens 3 --threads 1 --evaluate-every 2 --save-every 3 --dropout 0.1"


def command(base: Path, rows: Path, out: Path, *flags: str) -> list[str]:
    return ["kto", "--checkpoint", str(base), "--data", str(rows), "--out", str(out), *FLAGS.split(), *flags]


def test_a_run_learns_the_labels_and_resumes_to_the_same_bytes(
    tiny_checkpoint: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_checkpoint("base")
    flags = ["--learning-rate", "0.003"]
    assert main(command(base, rows, tmp_path / "whole", *flags)) == 0
    assert load_checkpoint(tmp_path / "whole" / "best").details["made_by"] == "topkapi kto"
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [record for record in records if "validation_loss" in record]
    # Nothing has moved before the first step: every m is zero, and z too.
    assert evaluations[0]["validation_loss"] == pytest.approx(0.5, abs=1e-6)
    assert evaluations[0]["validation_kl"] == pytest.approx(0, abs=1e-5)
    assert evaluations[-1]["validation_loss"] < 0.48 and evaluations[-1]["validation_accuracy"] == 1.0
    out = capsys.readouterr().out
    assert "accuracy 1.000  margin" in out and "recommended" not in out
    resumed = tmp_path / "resumed"
    assert_resumes_to_the_same(command(base, rows, resumed, *flags), resumed, tmp_path / "whole", monkeypatch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta must be a number above 0"),
        (["--desirable-weight", "0"], "--desirable-weight must be a number above 0"),
        (["--batch-size", "1"], "--batch-size must be"),
        (["--z-loss", "0.1"], "the loss of labelled answers has no z-loss"),
        (["--batch-size", "99"], "18 training answers (2 more held out for validation) do not fill one batch of 99"),
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


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([True] * 12, "all 12 answers are good: there is nothing to tell them from"),
        ([True] * 9 + [False] * 3, "the good ones weigh 3 times as much, and 1 to 1.33 times is recommended: "
         "--undesirable-weight 3"),
        ([True] * 3 + [False] * 9, "--desirable-weight 3"),
    ],
)  # fmt: skip
def test_kinds_that_weigh_too_unlike_are_told(
    labels: list[bool],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": f"{n}", "completion": "a", "label": each} for n, each in enumerate(labels)]))
    flags = ["--validation-fraction", "0", "--max-steps", "1", "--sample-every", "never"]
    assert main(command(tiny_checkpoint("base"), path, tmp_path / "run", *flags)) == 0
    assert message in " ".join(capsys.readouterr().out.split())
