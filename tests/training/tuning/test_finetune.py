"""Instructions to examples: every format read, every answer trained to its end token, every bad row named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main
from topkapi.training.data.instructions import (
    Conversation,
    Example,
    ExampleLoader,
    encode_conversations,
    read_conversations,
)
from topkapi.training.data.windows import IGNORED

CHATML = ChatTemplate.built_in("chatml")
ALPACA = ChatTemplate.built_in("alpaca")
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"instruction": "Why?", "output": "Because.", "category": "x"},
        {"instruction": "Why?", "instances": [{"input": "", "output": "Because."}]},
        {"prompt": "Why?", "completion": "Because."},
        {"question": "Why?", "answer": "Because."},
        {"messages": TURNS},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_every_format_gives_the_same_conversation(row: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps([row] if name.endswith("json") else row))
    (conversation,) = read_conversations(path, input_heading=False)
    assert conversation.messages == TURNS


def test_an_input_is_part_of_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1, 2", "output": "3"}]))
    (alpaca,) = read_conversations(path, input_heading=True)
    assert ALPACA.render(alpaca.messages, add_generation_prompt=False, eos_token="<|endoftext|>") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n3<|endoftext|>"
    )
    (plain,) = read_conversations(path, input_heading=False)
    assert plain.messages[0]["content"] == "Add.\n\n1, 2"


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "empty answer": ({"instruction": "a", "input": "", "output": "  "}, "row 2: the answer is empty"),
    "empty turn": (
        {"messages": [*TURNS[:1], {"role": "assistant", "content": ""}, *TURNS]},
        "row 2: the answer is empty",
    ),
    "no output": ({"instruction": "a"}, "row 2: no text in the field 'output'"),
    "unknown fields": ({"q": "a", "a": "b"}, "row 2: unknown fields q, a"),
    "not an object": ("text", "row 2: not an object"),
    "no answer": ({"messages": TURNS[:1]}, "row 2: the last message must be the assistant's answer"),
    "number": ({"prompt": "a", "completion": 3}, "row 2: no text in the field 'completion'"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named(kind: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[kind]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b"}, row]))
    with pytest.raises(DataError) as caught:
        read_conversations(path, input_heading=False)
    assert f"{path}, {message}" in caught.value.message


@pytest.mark.parametrize("template", [CHATML, ALPACA], ids=["chatml", "alpaca"])
def test_the_last_trained_token_ends_the_turn(template: ChatTemplate, tiny_tokenizer: Tokenizer) -> None:
    conversation = Conversation([*TURNS, *TURNS], "here")
    ((example,), dropped) = encode_conversations([conversation], tiny_tokenizer, template, longest=999)
    assert dropped == []
    answers = tiny_tokenizer.decode(
        [t for t, trained in zip(example.token_ids, example.trained, strict=True) if trained]
    )
    end = "<|im_end|>" if template is CHATML else "<|endoftext|>"
    assert answers == f"Because.{end}Because.{end}"


def test_a_template_without_a_trained_end_is_refused(tiny_tokenizer: Tokenizer) -> None:
    endless = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="here: the answer's end token would not be trained"):
        encode_conversations([Conversation(TURNS, "here")], tiny_tokenizer, endless, longest=999)


def test_an_answer_that_would_be_cut_is_refused_or_dropped_whole(tiny_tokenizer: Tokenizer) -> None:
    long = [TURNS[0], {"role": "assistant", "content": "very " * 100}]
    rows = [Conversation(TURNS, "row 1"), Conversation(long, "row 2"), Conversation(TURNS, "row 3")]
    with pytest.raises(DataError) as caught:
        encode_conversations(rows, tiny_tokenizer, CHATML, longest=60)
    assert "truncated away in 1 examples" in caught.value.message and "row 2 (" in caught.value.message
    assert "--on-overlong drop" in (caught.value.hint or "")
    examples, dropped = encode_conversations(rows, tiny_tokenizer, CHATML, longest=60, drop_overlong=True)
    assert [example.origin for example in examples] == ["row 1", "row 3"] and dropped == ["row 2"]
    # The last token is only a target, so an example may be one longer than the context.
    fits = len(examples[0].token_ids) - 1
    assert encode_conversations(rows[:1], tiny_tokenizer, CHATML, longest=fits)[1] == []
    assert encode_conversations(rows[:1], tiny_tokenizer, CHATML, longest=fits - 1, drop_overlong=True)[1] == ["row 1"]


END = 9
EXAMPLES = [
    Example([1, 2, 3, 4, END], [False, False, False, True, True], "a"),
    Example([1, 2, END], [False, True, True], "b"),
]


@pytest.mark.parametrize(("weight", "trained"), [(0.0, [2, 2]), (1.0, [4, 2]), (0.25, [4, 2])])
def test_examples_stand_side_by_side_and_the_end_is_always_trained(weight: float, trained: list[int]) -> None:
    loader = ExampleLoader(EXAMPLES, batch_size=2, seed=0, prompt_loss_weight=weight)
    (batch,) = loader.first(None)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 1, 2]]
    assert (batch.size, batch.lengths) == (2, (4, 2))
    assert [int((part.targets != IGNORED).sum()) for part in batch.split(1)] == trained
    assert batch.targets[0, 3:].tolist() == [END, 2, END]
    assert batch.weights is not None
    assert batch.weights[0].tolist() == [weight, weight, 1.0, 1.0, 1.0, 1.0]
    assert batch.weight() == pytest.approx(2 + 2 * weight + 2)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps([{"instruction": f"Say {n % 25}.", "input": "", "output": f"It is {n % 25}."} for n in range(30)])
    )
    return path


FLAGS = ["--batch-size", "4", "--max-steps", "2", "--sample-tokens", "3", "--threads", "1"]


def test_a_checkpoint_without_chat_tokens_gets_them(
    tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = load_checkpoint(tiny_checkpoint("plain", chat=False))
    bare = Tokenizer.train(["some text to train on, some text to train on"] * 3, 262)
    base = save_checkpoint(tmp_path / "bare", model=parent.model, tokenizer=bare, chat=None, generation={}, details={})
    out = tmp_path / "run"
    arguments = ["finetune", "--checkpoint", str(base), "--data", str(rows), "--out", str(out), *FLAGS]
    assert main([*arguments, "--context-length", "128"]) == 0
    printed = capsys.readouterr().out
    assert "the vocabulary gets <|im_start|> and <|im_end|>" in printed
    tuned = load_checkpoint(out / "best")
    assert tuned.chat is not None and tuned.chat.source == CHATML.source
    # The network had rows to spare, so it keeps its size.
    assert tuned.config.vocab_size == parent.config.vocab_size == 512
    assert tuned.tokenizer.control_tokens["<|im_end|>"] in tuned.config.end_token_ids
    assert tuned.details["parent"]["name"] == "bare" and tuned.details["step"] == 2
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["expected"].startswith("It is ")


def test_file_order_leaves_the_test_part_alone(
    tiny_checkpoint: Callable[..., Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = ["--split", "file_order", "--train-examples", "20", "--test-examples", "6", "--prompt-loss-weight", "1"]
    out = tmp_path / "run"
    parent = tiny_checkpoint("parent")
    arguments = ["finetune", "--checkpoint", str(parent), "--data", str(rows), "--out", str(out), *FLAGS, *split]
    assert main(arguments) == 0
    assert "20 training examples, 4 for validation" in capsys.readouterr().out
    details = load_checkpoint(out / "best").details
    assert details["data"]["validation_prompts_in_training"] == 4
    assert main([*arguments, "--overwrite", "--train-examples", "40"]) == 2
    assert "30 examples cannot be split into 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "gone.json"], "no such file, folder or glob: gone.json"),
        (["--checkpoint", "gone"], "there is no checkpoint at gone"),
        (["--chat-template", "gone"], "there is no chat template gone"),
        (["--batch-size", "99"], "do not fill one batch of 99"),
        (["--data", "{}/one.json"], "0 training examples (1 more held out for validation) do not fill one batch of"),
        (["--data", "{}/rows.jsn"], "no such file"),
        (["--data", "{}/plain.txt"], "plain.txt is not a kind of file that holds examples"),
        (["--prompt-loss-weight", "2"], "--prompt-loss-weight must be a number from 0 to 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_two_lines(
    flags: list[str],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "plain.txt").write_text("text")
    (tmp_path / "one.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    given = ["--checkpoint", str(tiny_checkpoint("parent")), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert main(["finetune", *given, *FLAGS, *(flag.replace("{}", str(tmp_path)) for flag in flags)]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error and hint.startswith("hint: ")


def test_what_is_said_to_be_enough_is_enough(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.json"

    def train(count: int, *more: str) -> int:
        path.write_text(json.dumps([{"prompt": f"Say {n}", "completion": "yes"} for n in range(count)]))
        given = ["--checkpoint", str(tiny_checkpoint("parent")), "--data", str(path), "--out", str(tmp_path / "run")]
        short = ["--batch-size", "8", "--max-steps", "1", "--sample-every", "never", "--threads", "1", "--overwrite"]
        return main(["finetune", *given, *short, *more])

    for fraction in ("0.3", "0"):
        assert train(1, "--validation-fraction", fraction) == 2
        (found,) = re.findall(r"give at least (\d+) examples", capsys.readouterr().err)
        needed = int(found)
        assert train(needed - 1, "--validation-fraction", fraction) == 2
        assert train(needed, "--validation-fraction", fraction) == 0
        capsys.readouterr()
