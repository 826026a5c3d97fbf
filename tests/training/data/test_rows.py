"""Every field of the rows that training reads, with what becomes of it: used, refused by name, or named as left out."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from tests.service.api.openai.openai_cases import TOOL_TEMPLATE, WEATHER
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import DataError
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.instructions import Conversation, encode_conversations, read_conversations
from topkapi.training.data.preferences import encode_preferences, read_preferences
from topkapi.training.data.rows import REFUSED
from topkapi.training.data.sources import fields_beside
from topkapi.training.data.turns import REFUSED_OF_MESSAGES

USED, REFUSED_BY_NAME, LEFT_OUT = "used", "refused", "left out"
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
ASK = {"role": "user", "content": "Why?"}
SO, NO = ({"role": "assistant", "content": text} for text in ("So.", "No."))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Izmir"}}}

BASES: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "Why?", "output": "So."},
    "prompt": {"prompt": "Why?", "completion": "So."},
    "question": {"question": "Why?", "answer": "So."},
    "messages": {"messages": [ASK, SO]},
}

# (field, value): what becomes of it in rows of every form, and the messages where it is used.
ROWS: list[tuple[str, Any, str, Any]] = [
    ("system", "Be brief.", USED, [SYSTEM, ASK, SO]),
    ("system_prompt", "Be brief.", USED, [SYSTEM, ASK, SO]),
    ("system", "", USED, [ASK, SO]),
    ("system", None, USED, [ASK, SO]),
    ("system", 3, REFUSED_BY_NAME, "'system' must be text"),
    ("history", [["Hello?", "Hello."]], USED, [*EARLIER, ASK, SO]),
    ("history", EARLIER, USED, [*EARLIER, ASK, SO]),
    ("history", [], USED, [ASK, SO]),
    ("history", "Hello?", REFUSED_BY_NAME, "'history' must be a list"),
    ("tools", [WEATHER], USED, [ASK, SO]),
    ("tools", json.dumps([WEATHER]), USED, [ASK, SO]),
    ("tools", "weather", REFUSED_BY_NAME, "tools is not valid JSON"),
    ("chat_template_kwargs", {"enable_thinking": False}, USED, [ASK, SO]),
    ("chat_template_kwargs", [1], REFUSED_BY_NAME, "'chat_template_kwargs' must be an object"),
    ("weight", 1, LEFT_OUT, "weight"),
    ("weight", 0.5, REFUSED_BY_NAME, "'weight' can't be used"),
    ("label", True, REFUSED_BY_NAME, "'label' can't be used"),
    ("label", "sports", LEFT_OUT, "label"),
    *((name, ["x"], REFUSED_BY_NAME, f"'{name}' can't be used") for name in REFUSED if name not in ("weight", "label")),
    *((name, [], USED, [ASK, SO]) for name in REFUSED if name not in ("weight", "label")),
    # What public sets tell of their rows (Alpaca, Dolly, UltraChat, OpenAssistant, FLAN, self-instruct, OpenAI's).
    *(
        (name, "x", LEFT_OUT, name)
        for name in ("id", "prompt_id", "source", "category", "dataset", "text", "lang", "score", "rating", "topic",
                     "is_classification", "parallel_tool_calls", "metadata", "task", "model")
    ),
]  # fmt: skip


def read(path: Path, row: Any, heading: bool = False) -> tuple[list[Conversation], set[str]]:
    path.write_text(json.dumps([row]))
    left_out: set[str] = set()
    return read_conversations(path, input_heading=heading, left_out=left_out), left_out


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("field", "value", "becomes", "expected"), ROWS, ids=lambda value: str(value)[:20])
def test_a_field_beside_a_row_of_any_form(
    base: str, field: str, value: Any, becomes: str, expected: Any, tmp_path: Path
) -> None:
    row = BASES[base] | {field: value}
    if becomes == REFUSED_BY_NAME:
        with pytest.raises(DataError) as caught:
            read(tmp_path / "rows.json", row)
        assert "row 1: " in caught.value.message and expected in caught.value.message and caught.value.hint
        return
    (conversation,), left_out = read(tmp_path / "rows.json", row)
    assert conversation.messages == (expected if becomes == USED else [ASK, SO])
    assert left_out == ({expected} if becomes == LEFT_OUT else set())


@pytest.mark.parametrize("base", ["alpaca", "prompt", "question"])
@pytest.mark.parametrize("field", ["input", "context"])
def test_what_is_asked_about_is_below_the_question(base: str, field: str, tmp_path: Path) -> None:
    (plain,), left_out = read(tmp_path / "rows.json", BASES[base] | {field: "1, 2"})
    (headed,), _ = read(tmp_path / "rows.json", BASES[base] | {field: "1, 2"}, heading=True)
    assert plain.messages == [{**ASK, "content": "Why?\n\n1, 2"}, SO] and not left_out
    assert headed.messages == [{**ASK, "content": "Why?\n\n### Input:\n1, 2"}, SO]
    with pytest.raises(DataError, match="both input and context"):
        read(tmp_path / "rows.json", BASES[base] | {"input": "1", "context": "2"})


def test_an_answer_by_another_name(tmp_path: Path) -> None:
    """Dolly's rows, and what has an answer under two names."""
    dolly = {"instruction": "Why?", "context": "", "response": "So.", "category": "open_qa"}
    (conversation,), left_out = read(tmp_path / "rows.json", dolly)
    assert conversation.messages == [ASK, SO] and left_out == {"category"}
    (conversation,), left_out = read(tmp_path / "rows.json", BASES["alpaca"] | {"response": "Other."})
    assert conversation.messages == [ASK, SO] and left_out == {"response"}


def test_what_ultrachat_says_twice_is_said_once(tmp_path: Path) -> None:
    (conversation,), left_out = read(
        tmp_path / "rows.json", {"prompt": "Why?", "prompt_id": "1", "messages": [ASK, SO]}
    )
    assert conversation.messages == [ASK, SO] and left_out == {"prompt", "prompt_id"}


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    messages = [SYSTEM, ASK, SO]
    (conversation,), _ = read(tmp_path / "rows.json", {"messages": messages, "system": "Be brief."})
    assert conversation.messages == messages
    for row in ({"messages": messages, "system": "Be long."}, BASES["prompt"] | {"system": "a", "system_prompt": "b"}):
        with pytest.raises(DataError, match="row 1: system"):
            read(tmp_path / "rows.json", row)


MESSAGES: list[tuple[str, Any, str, Any]] = [
    ("weight", 0, USED, {}),
    ("weight", 1, USED, {}),
    ("weight", None, USED, {}),
    ("weight", 0.5, REFUSED_BY_NAME, "messages[1].weight is 0.5"),
    ("name", "Bo", USED, {"name": "Bo"}),
    ("name", None, USED, {}),
    ("reasoning_content", "Hm.", USED, {"reasoning_content": "Hm."}),
    ("reasoning_content", None, USED, {}),
    ("tool_calls", [CALL], USED, {"tool_calls": [CALL]}),
    ("tool_calls", [], USED, {}),
    ("tool_calls", [{"function": {"name": "weather", "arguments": '{"city": "Izmir"}'}}], USED, {"tool_calls": [CALL]}),
    ("tool_calls", [{"function": {}}], REFUSED_BY_NAME, "messages[1].tool_calls must be"),
    *((name, "x", REFUSED_BY_NAME, f"messages[1].{name} can't be used") for name in REFUSED_OF_MESSAGES),
    *((name, None, USED, {}) for name in REFUSED_OF_MESSAGES),
    *((name, "x", LEFT_OUT, f"messages[].{name}") for name in ("id", "date", "model", "annotations")),
]


@pytest.mark.parametrize(("field", "value", "becomes", "expected"), MESSAGES, ids=lambda value: str(value)[:20])
def test_a_field_of_a_message(field: str, value: Any, becomes: str, expected: Any, tmp_path: Path) -> None:
    row = {"messages": [ASK, SO | {field: value}, ASK, NO]}
    if becomes == REFUSED_BY_NAME:
        with pytest.raises(DataError) as caught:
            read(tmp_path / "rows.json", row)
        assert "row 1: " in caught.value.message and expected in caught.value.message and caught.value.hint
        return
    (conversation,), left_out = read(tmp_path / "rows.json", row)
    assert conversation.messages[1] == (SO | expected if becomes == USED else SO)
    assert left_out == ({expected} if becomes == LEFT_OUT else set())


def test_contents_in_parts_and_calls_without_content(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    told = {"role": "tool", "content": "Sunny.", "tool_call_id": "1", "name": "weather"}
    row = {"messages": [{"role": "developer", "content": parts}, ASK,
                        {"role": "assistant", "content": None, "tool_calls": [CALL]}, told, SO]}  # fmt: skip
    (conversation,), _ = read(tmp_path / "rows.json", row)
    assert conversation.messages[0] == {"role": "system", "content": "one\ntwo"}
    assert conversation.messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation.messages[3] == told


def trained(example: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token for token, each in zip(example.token_ids, example.trained, strict=True) if each])


def test_a_weight_of_zero_is_shown_and_not_trained(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    chat = ChatTemplate.built_in("chatml")
    rows = {"messages": [ASK, SO | {"weight": 0}, ASK, NO | {"weight": 1}, ASK, SO]}
    found, _ = read(tmp_path / "rows.json", rows)
    ((example,), _) = encode_conversations(found, tiny_tokenizer, chat, longest=999)
    assert trained(example, tiny_tokenizer) == "No.<|im_end|>So.<|im_end|>"
    assert tiny_tokenizer.decode(example.token_ids).count("So.") == 2
    with pytest.raises(DataError, match="row 1: every answer has the weight 0"):
        read(tmp_path / "rows.json", {"messages": [ASK, SO | {"weight": 0}]})
    with pytest.raises(DataError, match=r"row 1: messages\[0\].weight is 1"):
        read(tmp_path / "rows.json", {"messages": [ASK | {"weight": 1}, SO]})


def test_of_a_prompt_of_messages_only_the_completion_is_trained(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As TRL does with rows of prompt and completion."""
    found, _ = read(tmp_path / "rows.json", {"prompt": [*EARLIER, ASK], "completion": [SO]})
    assert found[0].messages == [*EARLIER, ASK, SO]
    ((example,), _) = encode_conversations(found, tiny_tokenizer, ChatTemplate.built_in("chatml"), longest=999)
    assert trained(example, tiny_tokenizer) == "So.<|im_end|>"


def test_tools_and_calls_reach_the_template_or_are_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"messages": [ASK, SO | {"tool_calls": [CALL]}], "tools": [WEATHER]}
    found, _ = read(tmp_path / "rows.json", row)
    ((example,), _) = encode_conversations(found, tiny_tokenizer, ChatTemplate(TOOL_TEMPLATE), longest=999)
    text = tiny_tokenizer.decode(example.token_ids)
    assert "The weather of a city." in text and '{"name": "weather", "arguments": {"city": "Izmir"}}' in text
    for field in ("tools", "tool_calls"):
        one = {"messages": [ASK, SO]} | row if field == "tools" else {"messages": row["messages"]}
        found, _ = read(tmp_path / "rows.json", one)
        with pytest.raises(DataError, match=f"row 1: the chat template has no place for {field}"):
            encode_conversations(found, tiny_tokenizer, ChatTemplate.built_in("chatml"), longest=999)


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}"
    "{{ 'quietly' }}{% endif %}{% endif %}"
)


def test_reasoning_and_variables_reach_the_template_or_are_refused(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = {"messages": [ASK, SO | {"reasoning_content": "Hm."}], "chat_template_kwargs": {"enable_thinking": True}}
    found, _ = read(tmp_path / "rows.json", row)
    ((example,), _) = encode_conversations(found, tiny_tokenizer, ChatTemplate(THINKING), longest=999)
    assert trained(example, tiny_tokenizer) == "<think>Hm.</think>So.<|im_end|>"
    for one, field in ((row, "reasoning_content"), (row | {"messages": [ASK, SO]}, "chat_template_kwargs.enable_thi")):
        found, _ = read(tmp_path / "rows.json", one)
        with pytest.raises(DataError, match=f"no place for {field}"):
            encode_conversations(found, tiny_tokenizer, ChatTemplate.built_in("chatml"), longest=999)
    found, _ = read(tmp_path / "rows.json", {"messages": [ASK | {"name": "Bo"}, SO]})
    with pytest.raises(DataError, match="no place for name"):
        encode_conversations(found, tiny_tokenizer, ChatTemplate.built_in("chatml"), longest=999)


HUMAN = "\n\nHuman: Hello?\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
PAIRS: dict[str, tuple[dict[str, Any], list[Any], set[str]]] = {
    # TRL's documented forms: explicit and implicit prompts, standard and conversational.
    "explicit, texts": ({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, [ASK], set()),
    "explicit, conversations": ({"prompt": [ASK], "chosen": [SO], "rejected": [NO]}, [ASK], set()),
    "implicit, conversations": (
        {"chosen": [*EARLIER, ASK, SO], "rejected": [*EARLIER, ASK, NO]}, [*EARLIER, ASK], set(),
    ),
    # UltraFeedback, binarized: the prompt's text and once more in both answers; scores and a copy of the chosen one.
    "the prompt said again": (
        {"prompt": "Why?", "prompt_id": "1", "chosen": [ASK, SO], "rejected": [ASK, NO], "messages": [ASK, SO],
         "score_chosen": 8.0, "score_rejected": 5.0},
        [ASK],
        {"prompt_id", "messages", "score_chosen", "score_rejected"},
    ),
    "the prompt's turns said again": ({"prompt": [ASK], "chosen": [ASK, SO], "rejected": [ASK, NO]}, [ASK], set()),
    "a system message and the prompt again": (
        {"prompt": "Why?", "chosen": [SYSTEM, ASK, SO], "rejected": [SYSTEM, ASK, NO]}, [SYSTEM, ASK], set(),
    ),
    "the prompt is the last question": (
        {"prompt": "Why?", "chosen": [*EARLIER, ASK, SO], "rejected": [*EARLIER, ASK, NO]}, [*EARLIER, ASK], set(),
    ),
    "the prompt's text said again": (
        {"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}, [ASK], set(),
    ),
    # Anthropic's hh-rlhf: whole dialogues as texts, with and without the prompt apart.
    "dialogues": ({"chosen": HUMAN + " So.", "rejected": HUMAN + " No."}, [*EARLIER, ASK], set()),
    "dialogues after a prompt": ({"prompt": HUMAN, "chosen": " So.", "rejected": " No."}, [*EARLIER, ASK], set()),
    "dialogues that repeat the prompt": (
        {"prompt": HUMAN, "chosen": HUMAN + " So.", "rejected": HUMAN + " No."}, [*EARLIER, ASK], set(),
    ),
    # Orca's pairs, and HelpSteer's names.
    "orca": ({"system": "Be brief.", "question": "Why?", "chosen": "So.", "rejected": "No."}, [SYSTEM, ASK], set()),
    "alpaca": (
        {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No.", "margin": 0.5}, [ASK], {"margin"},
    ),
    "history": (
        {"history": [["Hello?", "Hello."]], "prompt": "Why?", "chosen": "So.", "rejected": "No."},
        [*EARLIER, ASK],
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pair_says_no_turn_twice(kind: str, tmp_path: Path) -> None:
    row, prompt, unused = PAIRS[kind]
    path, left_out = tmp_path / "rows.json", set[str]()
    path.write_text(json.dumps([row]))
    (pair,) = read_preferences(path, left_out)
    assert pair.prompt() == pair.rejected.prompt() == prompt and left_out == unused
    assert [each.messages[-1]["content"].strip() for each in (pair.chosen, pair.rejected)] == ["So.", "No."]


BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "How?", "chosen": [ASK, SO], "rejected": [ASK, NO]}, "row 1: 'chosen' begins with turns"),
    ({"prompt": "Why?", "chosen": [SO | {"weight": 0}], "rejected": [NO]}, "row 1: the answer in 'chosen' has"),
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "images": ["x"]}, "row 1: 'images' can't be used"),
    ({"prompt": "Why?", "chosen": "So.", "rejected": "No.", "weight": 2}, "row 1: 'weight' can't be used"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS, ids=lambda value: str(value)[-40:])
def test_what_a_pair_cannot_mean_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert message in caught.value.message


def test_the_tools_of_a_pair_reach_the_template(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"prompt": [ASK], "chosen": [SO], "rejected": [NO], "tools": [WEATHER]}]))
    chat = ChatTemplate(TOOL_TEMPLATE)
    ((pair,), _) = encode_preferences(read_preferences(path), tiny_tokenizer, chat, longest=999)
    assert "The weather of a city." in tiny_tokenizer.decode(pair.rejected.token_ids)
    assert trained(pair.chosen, tiny_tokenizer) == "So.<|im_end|>"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow", "indexed.arrow", "a.txt"])
def test_what_stands_beside_a_text_is_named(name: str, tmp_path: Path) -> None:
    """Rows of plain text: the text is trained on, whatever else they hold is not."""
    rows = [{"text": "a", "title": "b", "id": 3}]
    table = pyarrow.table({key: [row[key] for row in rows] for key in rows[0]})
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith(".arrow"):
        make = pyarrow.ipc.new_file if name.startswith("indexed") else pyarrow.ipc.new_stream
        with make(path, table.schema) as writer:
            writer.write_table(table)
    else:
        line = b"" if name.endswith(".txt") else b"\n" + json.dumps(rows[0]).encode()
        path.write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    assert fields_beside(path) == (set() if name.endswith(".txt") else {"title", "id"})
    assert fields_beside(path, "title") == (set() if name.endswith(".txt") else {"text", "id"})


def test_a_file_that_cannot_be_read_has_no_fields(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet", "a.arrow", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"{")
        assert fields_beside(tmp_path / name) == set()
