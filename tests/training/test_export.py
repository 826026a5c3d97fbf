"""What we make opens elsewhere: directories in another precision, Modelfiles, and cards of the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import tiny_model
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
from topkapi.model.storage.modelfile import TurnForms, modelfile
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main

IDS = list(range(3, 60, 4))

LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
OWN_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou \"help\".<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{% if loop.last or m['role'] != 'assistant' %}"
    "{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hi")],
    [("system", 'Be "brief".'), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello\n"), ("user", "What {{ is }} that?")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
]  # fmt: skip


def by_go(template: str, turns: list[tuple[str, str]]) -> str:
    """What Go's template of a Modelfile renders: its few forms said in Jinja's, with the same trimming of space."""
    forms = {
        r"range \$i, \$_ := \.Messages": "{% for m in Messages %}", r"\$last := .*": "{% set last = loop.last %}",
        r"if not \$last": "{% if not last %}", r"if not \.System": "{% if not System %}",
        r'if and \$last \(ne \.Role "assistant"\)': "{% if last and m.role != 'assistant' %}",
    }  # fmt: skip
    blocks: list[str] = []

    def said(found: re.Match[str]) -> str:
        trim, action = found[1], found[2].strip()
        if action.startswith('"'):
            made = "{{ " + action + " }}"
        elif action == ".Content":
            made = "{{ m.content }}"
        elif action == "end":
            made = "{% end" + blocks.pop() + " %}"
        elif role := re.fullmatch(r'(else )?if eq \.Role "(\w+)"', action):
            blocks.extend([] if role[1] else ["if"])
            made = "{% " + ("elif" if role[1] else "if") + f" m.role == '{role[2]}'" + " %}"
        else:
            (made,) = [jinja for pattern, jinja in forms.items() if re.fullmatch(pattern, action)]
            blocks.extend(["for"] if "for" in made[:6] else ["if"] if made.startswith("{% if") else [])
        return made[:2] + trim + made[2:]

    translated = re.sub(r"\{\{(-?)(.*?)\}\}", said, template)
    assert not blocks
    system = "\n".join(content for role, content in turns if role == "system")
    messages = [{"role": role, "content": content} for role, content in turns]
    return (
        jinja2.Environment(keep_trailing_newline=True).from_string(translated).render(Messages=messages, System=system)
    )


@pytest.mark.parametrize("source", ["chatml", "alpaca", LLAMA3, OWN_SYSTEM], ids=["chatml", "alpaca", "llama3", "own"])
def test_a_go_template_renders_what_the_chat_template_does(source: str) -> None:
    chat = ChatTemplate.built_in(source) if source in ("chatml", "alpaca") else ChatTemplate(source)
    template = TurnForms.of(chat).go_template()
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        assert by_go(template, turns) == chat.render(messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [(NO_SYSTEM, "no system here"), (FORGETS, "is not shown once|does more than put something around")],
)
def test_a_template_that_has_no_form_there_is_refused_by_name(source: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        TurnForms.of(ChatTemplate(source))
    assert caught.value.field == "chat_template"
    assert "export gguf" in str(caught.value.hint)


def test_a_begin_token_that_the_reader_adds_is_not_said_twice() -> None:
    chat = ChatTemplate("{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</>' }}"
                        "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")  # fmt: skip
    forms = TurnForms.of(chat, "<s>")
    assert (forms.unsaid, forms.around["user"][0], forms.around["system"][0]) == ("", "<user>", "<system>")


def test_ollama_gets_a_file_and_what_it_has_to_be_told(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = {"temperature": 0.3, "top_k": 20, "repetition_penalty": 1.5, "max_new_tokens": 77}
    source = tiny_checkpoint("for-ollama", generation=generation)
    assert main(["export", "ollama", str(source), str(tmp_path / "mine"), "--type", "q8_0"]) == 0
    assert "ollama create mine -f Modelfile" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"mine.gguf", "Modelfile"}
    said = (tmp_path / "mine" / "Modelfile").read_text()
    assert said.startswith("FROM ./mine.gguf\n")
    parameters = re.findall(r"^PARAMETER (\w+) (.*)$", said, re.MULTILINE)
    assert parameters == [
        ("temperature", "0.3"), ("top_k", "20"), ("top_p", "1"), ("min_p", "0"), ("repeat_penalty", "1.5"),
        ("repeat_last_n", "-1"), ("num_predict", "77"), ("num_ctx", "128"),
        ("stop", '"<|endoftext|>"'), ("stop", '"<|im_end|>"'),
    ]  # fmt: skip
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', said, re.MULTILINE | re.DOTALL)
    checkpoint = load_checkpoint(source)
    assert checkpoint.chat is not None
    assert by_go(template, CONVERSATIONS[1]) == checkpoint.chat.render(
        [{"role": role, "content": content} for role, content in CONVERSATIONS[1]]
    )
    assert load_checkpoint(tmp_path / "mine" / "mine.gguf").config.vocab_size == checkpoint.config.vocab_size
    assert main(["export", "ollama", str(source), str(tmp_path / "mine")]) == 2


def test_a_default_that_ollama_has_no_parameter_for_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("odd-default", generation={"no_repeat_ngram_size": 3})
    assert main(["export", "ollama", str(source), str(tmp_path / "odd")]) == 2
    assert "ollama has no parameter for the checkpoint's default no_repeat_ngram_size" in capsys.readouterr().err
    assert not (tmp_path / "odd").exists()


def test_a_base_checkpoint_has_no_template(tiny_checkpoint: Callable[..., Path]) -> None:
    said = modelfile(load_checkpoint(tiny_checkpoint("plain", chat=False)), "plain.gguf")
    assert 'TEMPLATE """{{ .Prompt }}"""' in said and "PARAMETER temperature 1\n" in said


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[] if dtype == "bfloat16" or family == "gpt2" else [pytest.mark.slow])
        for family in FAMILIES
        for dtype in ("bfloat16", "float16", "float32")
    ],
)
def test_a_directory_in_another_precision_opens_in_transformers(
    family: str, dtype: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model(family, vocab_size=tiny_tokenizer.vocab_size, tie_embeddings=family == "gpt2")
    source = save_checkpoint(
        tmp_path / "source", model=model, tokenizer=tiny_tokenizer, chat=None, generation={}, details={"note": "x"}
    )
    out = tmp_path / "out"
    assert main(["export", "safetensors", str(source), str(out), "--dtype", dtype]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert str(theirs.dtype) == f"torch.{dtype}"
    assert {str(parameter.dtype) for parameter in theirs.parameters()} == {f"torch.{dtype}"}
    ours = load_checkpoint(out, dtype=torch.float32)
    assert ours.details["exported_from"] == "source" and ours.details["note"] == "x"
    with torch.no_grad():
        # Loaded as float32, not made so afterwards: what gemma multiplies embeddings with would have been rounded.
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        found = theirs(torch.tensor([IDS])).logits[0]
        expected = ours.model(torch.tensor([IDS]), torch.arange(len(IDS)).unsqueeze(0))[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    # What vLLM's loader looks for: the architecture, the type (under the name that earlier releases of transformers
    # have), whether input and output share a matrix, and the longest text.
    raw, config = json.loads((out / "config.json").read_text()), AutoConfig.from_pretrained(out)
    assert raw["torch_dtype"] == raw["dtype"] == dtype
    assert config.architectures == [FAMILIES[family].architecture]
    assert config.tie_word_embeddings is (family == "gpt2")
    longest = config.n_positions if family == "gpt2" else config.max_position_embeddings
    assert longest == model.config.context_length
    assert json.loads((out / "tokenizer_config.json").read_text()).get("model_max_length", longest) >= longest
    assert main(["export", "safetensors", str(source), str(out)]) == 2, "what is there stays"


def test_an_adapter_is_merged_and_numbers_too_large_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("adapted")
    out = tmp_path / "adapter"
    assert main(["finetune", "--checkpoint", str(source), "--data", str(rows(tmp_path)), "--method", "lora", "--out",
                 str(tmp_path / "run"), "--max-steps", "1", "--batch-size", "2", "--sample-every", "never",
                 "--learning-rate", "0.01"]) == 0  # fmt: skip
    assert main(["export", "safetensors", str(tmp_path / "run" / "last"), str(out), "--dtype", "float32"]) == 0
    adapted = load_checkpoint(tmp_path / "run" / "last", dtype=torch.float32).model.state_dict()
    merged = load_checkpoint(out, dtype=torch.float32).model.state_dict()
    assert adapted.keys() == merged.keys()
    assert all(torch.equal(adapted[name], merged[name]) for name in merged)
    assert not (out / "adapter_config.json").exists()
    before = load_checkpoint(source, dtype=torch.float32).model.state_dict()
    assert any(not torch.equal(before[name], merged[name]) for name in merged)

    loaded = load_checkpoint(source, dtype=torch.float32)
    with torch.no_grad():
        loaded.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    huge = save_checkpoint(
        tmp_path / "huge", model=loaded.model, tokenizer=loaded.tokenizer, chat=None, generation={}, details={}
    )
    capsys.readouterr()
    assert main(["export", "safetensors", str(huge), str(tmp_path / "half"), "--dtype", "float16"]) == 2
    assert "numbers too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(8)))
    return path


def test_a_card_has_its_figures_as_the_hub_reads_them(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, english: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_checkpoint("carded")
    (tmp_path / "held-out.txt").write_text(english[:2000])
    assert (
        main(["evaluate", str(source), "--perplexity", str(tmp_path / "held-out.txt"), "--out", str(tmp_path / "e")])
        == 0
    )
    out = tmp_path / "README.md"
    asked: list[Any] = [
        "export",
        "card",
        source,
        "--evaluation",
        tmp_path / "e" / "evaluation.json",
        "--license",
        "mit",
    ]
    assert main([*map(str, asked), "--name", "carded", "--out", str(out)]) == 0
    card = ModelCard.load(out)
    measured = json.loads((tmp_path / "e" / "evaluation.json").read_text())["tasks"][0]["measures"]
    values = {measure["measure"]: measure["values"][str(source)]["value"] for measure in measured}
    assert {each.metric_name: each.metric_value for each in card.data.eval_results} == pytest.approx(values, abs=1e-4)
    assert {each.dataset_name for each in card.data.eval_results} == {"held-out"}
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "text-generation",
    )
    assert {"topkapi", "qwen3", "conversational"} <= set(card.data.tags)
    assert "# carded" in card.text
    capsys.readouterr()
    assert main([*map(str, asked), "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (
        main(
            [
                "export",
                "card",
                str(source),
                "--evaluation",
                str(tmp_path / "held-out.txt"),
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 2
    )
    assert "is not what topkapi evaluate --out writes" in capsys.readouterr().err


def test_the_average_of_two_checkpoints(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    first, second = tiny_checkpoint("before"), tiny_checkpoint("after", seed=1, generation={"temperature": 0.2})
    out = tmp_path / "averaged"
    command = ["export", "average", str(first), str(second), str(out), "--part", "0.25", "--dtype", "float32"]
    assert main(command) == 0
    averaged, *theirs = (load_checkpoint(path) for path in (out, first, second))
    before, after = (dict(each.model.named_parameters()) for each in theirs)
    for name, tensor in averaged.model.named_parameters():
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * after[name], atol=1e-7), name
        assert not name.endswith("proj.weight") or not torch.equal(tensor, before[name])
    assert averaged.generation == theirs[1].generation, "the other one's"
    told = averaged.details["averaged_with"]
    assert (told["part"], told["name"], len(told["sha256"])) == (0.75, "before", 64)


def test_what_has_no_average_is_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, longer = tiny_checkpoint("one"), tiny_checkpoint("longer", context=64)
    for other, more, said in ((longer, [], "another configuration"), (first, ["--part", "1.5"], "from 0 to 1")):
        assert main(["export", "average", str(first), str(other), str(tmp_path / "out"), *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
