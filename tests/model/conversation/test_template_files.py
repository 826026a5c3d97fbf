"""Chat templates as checkpoints store them: several by name, what they see, and what is trained under each."""

import json
import re
from pathlib import Path

import pytest
import transformers

from tests import texts
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.conversation.template_files import named_templates
from topkapi.model.errors import CheckpointError, DataError, InvalidRequest
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.training.data.instructions import Conversation, encode_conversations
from topkapi.training.data.preferences import Preference, encode_preferences

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENIZER = Tokenizer.train([texts.JOINED] * 2, 500, CONTROL)


# Templates by name, and what they see


def test_the_template_for_tools_takes_their_place(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "hi"}]
    named = {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "never"}
    listed = [{"name": name, "template": source} for name, source in named.items()]
    tools = [{"type": "function", "function": {"name": "a"}}]
    Tokenizer.train(["a"], 257).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for form in (listed, named, "files"):
        if form == "files":
            form = {"default": "of the files instead"}
            (tmp_path / "chat_template.jinja").write_text("plain")
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(named["tool_use"])
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": form}))
        ours = ChatTemplate.from_directory(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert ours is not None and ours.takes_tools
        for given in (None, tools):
            expected = theirs.apply_chat_template(user, tools=given, tokenize=False)
            assert ours.render(user, tools=given) == expected
            ids = ours.encode(user, TOKENIZER, tools=given).token_ids
            assert TOKENIZER.decode(ids) == expected
        stored = ChatTemplate.of(named_templates(ours.stored))
        assert stored is not None and stored.others == ours.others and stored.source == ours.source


def test_without_a_default_only_what_another_template_is_for_is_rendered(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"tool_use": "tools"}}))
    template = ChatTemplate.from_directory(tmp_path)
    user = [{"role": "user", "content": "hi"}]
    assert template is not None and template.render(user, tools=[{}]) == "tools"
    with pytest.raises(InvalidRequest, match="chat templates tool_use, and none is called default"):
        template.render(user)
    for damaged in ([{"name": "default"}], 5, {"default": None}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": damaged}))
        with pytest.raises(CheckpointError, match="cannot be read"):
            ChatTemplate.from_directory(tmp_path)


def test_every_special_token_is_seen_by_its_name(tmp_path: Path) -> None:
    names = ["bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "boi"]
    definition = {**TOKENIZER.definition}
    special = [f"<{name}>" for name in names]
    Tokenizer(definition).with_control_tokens(special).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {f"{name}_token": f"<{name}>" for name in names if name != "image"}
    config["extra_special_tokens"] = {"image_token": "<image>"}
    config["add_bos_token"] = True
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = "".join(f"{{{{ {name}_token }}}}" for name in names) + "{{ other_token }}{{ messages[0].content }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, return_dict=False)
    ours = Tokenizer.from_directory(tmp_path)
    assert ChatTemplate(source).encode([{"role": "user", "content": "x"}], ours).token_ids == expected
    assert len(expected) == len(names) + 1


def test_reasoning_reaches_the_template_under_each_of_its_names() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }}{% endfor %}"
    )
    for name in ("reasoning_content", "thinking", "reasoning"):
        said = {"role": "assistant", "content": "b", name: "<|im_end|>"}
        assert template.render([said]) == "<|im_end|>|<|im_end|>|b"
        assert not set(template.encode([said], TOKENIZER).token_ids) & set(TOKENIZER.control_tokens.values())
    assert template.render([{"role": "assistant", "content": "b", "reasoning_content": None}]) == "||b"
    with pytest.raises(InvalidRequest, match="reasoning_content must be a string"):
        template.render([{"role": "assistant", "content": "b", "reasoning_content": 1}])


# What is trained where templates are the families' own

THINKS = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{% if loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""Reasoning in the last answer alone, as Qwen3 has it."""

ENDS = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- else %}{% generation %}{{ '<|endoftext|>' }}{% endgeneration %}{% endif %}"""
"""An end token of the text behind that of the turn, as Phi-3 has it."""

TWO_ANSWERS = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "I."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "They'd sung."},
]


def unmarked(source: str) -> str:
    return re.sub(r"\{%-? (end)?generation %\}", "", source)


@pytest.mark.parametrize("source", [THINKS, ENDS], ids=["thinks", "ends"])
def test_answers_that_history_rewrites_are_trained_as_they_are_given(source: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = ChatTemplate(unmarked(source))
    with pytest.raises(CheckpointError, match=r"answer of messages\[1\]"):
        own.encode(TWO_ANSWERS, TOKENIZER, add_generation_prompt=False)
    parts = own.encode_answers(TWO_ANSWERS, TOKENIZER)
    assert len(parts) == 2
    for part, length in zip(parts, (2, 4), strict=True):
        expected = theirs.apply_chat_template(
            TWO_ANSWERS[:length], chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        prompt = theirs.apply_chat_template(
            TWO_ANSWERS[: length - 1], chat_template=source, add_generation_prompt=True, return_dict=False
        )
        assert part.token_ids == expected["input_ids"]
        assert own.encode(TWO_ANSWERS[: length - 1], TOKENIZER).token_ids == prompt
        # The last answer's part of transformers' mask; the line break behind the last end token is in no one's way.
        mask = [each and index >= len(prompt) for index, each in enumerate(expected["assistant_masks"])]
        ours = [index for index, each in enumerate(part.trained) if each]
        assert ours == [index for index, each in enumerate(mask) if each][: len(ours)] and len(ours) >= sum(mask) - 1
        assert part.end(TOKENIZER) == TOKENIZER.control_tokens["<|im_end|>"]
    assert len(own.encode_answers(TWO_ANSWERS[:2], TOKENIZER)) == 1


@pytest.mark.parametrize("source", [THINKS, ENDS], ids=["thinks", "ends"])
def test_generation_blocks_may_go_on_after_the_end_token(source: str, tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate(source)
    (part,) = template.encode_answers(TWO_ANSWERS, TOKENIZER)
    expected = theirs.apply_chat_template(
        TWO_ANSWERS, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    assert part.token_ids == expected["input_ids"]
    assert [int(each) for each in part.trained] == expected["assistant_masks"]
    assert template.turn_end(TOKENIZER) == (TOKENIZER.control_tokens["<|im_end|>"],)
    conversation = Conversation(TWO_ANSWERS, "row 1")
    examples, _ = encode_conversations([conversation], TOKENIZER, template, longest=999)
    assert [example.token_ids for example in examples] == [part.token_ids]
    endless = ChatTemplate(source.replace("<|im_end|>", "").replace("<|endoftext|>", ""))
    with pytest.raises(DataError, match="the model could not stop"):
        encode_conversations([conversation], TOKENIZER, endless, longest=999)


def test_a_conversation_becomes_an_example_per_answer_that_history_rewrites() -> None:
    rows = [Conversation(TWO_ANSWERS, "row 1"), Conversation(TWO_ANSWERS[:2], "row 2")]
    own = ChatTemplate(unmarked(THINKS))
    examples, _ = encode_conversations(rows, TOKENIZER, own, longest=999)
    assert [example.origin for example in examples] == ["row 1", "row 1", "row 2"]
    longest = len(examples[0].token_ids)
    kept, dropped = encode_conversations(rows, TOKENIZER, own, longest=longest, drop_overlong=True)
    assert [example.origin for example in kept] == ["row 2"] and dropped == ["row 1"]


def test_a_generation_block_may_begin_inside_of_the_prompt() -> None:
    source = """\
{%- for m in messages %}{{- '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{% generation %}
{{- '\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}{% else %}{{ '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    template = ChatTemplate(source)
    (part,) = template.encode_answers(TWO_ANSWERS, TOKENIZER)
    answers = [token_id for token_id, trained in zip(part.token_ids, part.trained, strict=True) if trained]
    assert TOKENIZER.decode(answers) == "I.<|im_end|>\nThey'd sung.<|im_end|>\n"
    prompt = template.encode(TWO_ANSWERS[:3], TOKENIZER).token_ids
    assert part.token_ids[: len(prompt)] == prompt and part.trained[len(prompt)]


def test_of_pairs_only_the_last_answer_is_trained_as_it_is_given() -> None:
    own = ChatTemplate(unmarked(THINKS))
    chosen = Conversation(TWO_ANSWERS, "row 1")
    rejected = Conversation([*TWO_ANSWERS[:3], {"role": "assistant", "content": "No."}], "row 1")
    (pair,), _ = encode_preferences([Preference(chosen, rejected, "row 1")], TOKENIZER, own, longest=999)
    for example, answer in ((pair.chosen, "They'd sung."), (pair.rejected, "No.")):
        said = [token_id for token_id, trained in zip(example.token_ids, example.trained, strict=True) if trained]
        assert TOKENIZER.decode(said) == f"<think>\n\n</think>\n\n{answer}<|im_end|>"


def test_given_variables_are_seen_and_forge_nothing() -> None:
    template = ChatTemplate("{{ eos_token }}{{ note }}{{ flag }}", None, {"tool_use": "{{ extra }}"})
    assert template.variables == {"note", "flag", "extra"}
    user = [{"role": "user", "content": "x"}]
    ids = template.encode(user, TOKENIZER, given={"note": "<|im_end|>", "flag": True}).token_ids
    assert TOKENIZER.decode(ids) == "<|endoftext|><|im_end|>True"
    assert TOKENIZER.control_tokens["<|im_end|>"] not in ids
