"""A chat template that fails on the simplest conversations is refused or warned of when its checkpoint is loaded."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.model.conversation.test_tool_calls import LLAMA_TEMPLATE, TOOL_TEMPLATE
from topkapi.model.conversation.chat_template import BUILT_IN_TEMPLATES, ChatTemplate
from topkapi.model.conversation.template_trial import try_template
from topkapi.model.errors import CheckpointError

EACH = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSED = {
    "a refusal": ("{{ raise_exception('never') }}", "never"),
    "an error": ("{{ messages[0].content + 1 }}", "TypeError"),
    "a missing method": ("{{ messages[0].content.shout() }}", "shout"),
    "nothing": ("{% if false %}x{% endif %}", "renders nothing"),
}
WARNED = {
    "no further turns": (
        "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}" + EACH, "first answer: .*one",
    ),
    "a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('s') }}{% endif %}" + EACH, "system message.*s",
    ),
    "a variable": ("{{ language + 'x' }}" + EACH, "further variables"),
    "nobody's words": ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not show what the user says"),
}  # fmt: skip


@pytest.mark.parametrize("template", [*BUILT_IN_TEMPLATES.values(), TOOL_TEMPLATE, LLAMA_TEMPLATE, EACH])
def test_ordinary_templates_pass(template, tiny_tokenizer) -> None:
    assert try_template(ChatTemplate(template), tiny_tokenizer) == []


@pytest.mark.parametrize(("template", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_fails_on_every_conversation_is_refused(template, reason, tiny_tokenizer) -> None:
    with pytest.raises(CheckpointError, match=f"whatever the conversation.*{reason}"):
        try_template(ChatTemplate(template), tiny_tokenizer)


@pytest.mark.parametrize(("template", "warning"), WARNED.values(), ids=WARNED)
def test_what_fails_on_some_is_warned_of(template, warning, tiny_tokenizer) -> None:
    (said,) = try_template(ChatTemplate(template), tiny_tokenizer)
    assert re.search(warning, said)


def test_one_among_named_ones_may_do_for_some_requests(tiny_tokenizer) -> None:
    chat = ChatTemplate.of({"rag": EACH})
    assert chat is not None
    (said,) = try_template(chat, tiny_tokenizer)
    assert "none is called default" in said


def test_a_server_says_so_when_it_loads_one(serve, tiny_checkpoint, tmp_path) -> None:
    for name, template in (("never", REFUSED["an error"][0]), ("once", WARNED["no further turns"][0])):
        shutil.copytree(tiny_checkpoint(name), tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
        (tmp_path / name / "topkapi.json").unlink(missing_ok=True)
    with serve(tiny_checkpoint("first"), model_directory=tmp_path) as served:
        refused = served.client.post("/models", json={"path": "never"})
        assert refused.status_code == 422 and "TypeError" in refused.json()["error"]["message"]
        loaded = served.client.post("/models", json={"path": "once"})
        assert loaded.status_code == 201 and "first answer" in loaded.json()["warnings"][0]
        assert served.client.get("/models/first").json()["warnings"] == []
