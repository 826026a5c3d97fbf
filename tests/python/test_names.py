"""What `import topkapi` gives: at once, with names that help, editors and type checkers know."""

from __future__ import annotations

import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import topkapi
from topkapi.model.decoding.parameters import PARAMETERS
from topkapi.python import declaring
from topkapi.service.api.native import schemas, score_schemas
from topkapi.service.commands.cli import COMPUTING
from topkapi.service.settings import DtypeName
from topkapi.training.evaluation.command import add_evaluate
from topkapi.training.recipes.recipe import DpoRecipe, FinetuneRecipe, KtoRecipe, PretrainRecipe

ASKING = ("generate", "agenerate", "stream", "astream", "chat", "achat", "stream_chat", "astream_chat")

CHILD = """
import json, sys
before = set(sys.modules)
import topkapi
new = {name.split(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
told = [sorted(new), sorted(dir(topkapi)), topkapi.__version__]
from topkapi.python.results import Generated
from topkapi.python.runs import Run
told.append([name for name in ("torch", "numpy", "pydantic", "fastapi") if name in sys.modules])
print(json.dumps(told))
"""


def test_importing_it_is_instant_and_lists_the_names() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    new, names, version, heavy = json.loads(done.stdout)
    assert new == ["topkapi"]
    assert heavy == []
    assert version == topkapi.__version__
    for name in ("load", "pretrain", "finetune", "dpo", "kto", "evaluate", "Model", "Run", "Generated", "TopkapiError"):
        assert name in names
        assert getattr(topkapi, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = topkapi.lode  # type: ignore[attr-defined]
    assert (Path(topkapi.__file__).parent / "py.typed").is_file()


def test_every_name_lies_where_it_is_looked_for_and_says_what_it_is() -> None:
    typed = Path(topkapi.__file__).read_text()
    for name, module in topkapi._LIES_IN.items():
        assert inspect.getdoc(getattr(topkapi, name)), f"{name} has no docstring"
        assert f"from {module} import {name} as {name}" in typed, "type checkers know it, too"
    assert set(topkapi.__all__) <= topkapi._LIES_IN.keys()


def test_help_reads_well() -> None:
    text = pydoc.render_doc(topkapi, renderer=pydoc.plaintext)
    lines = text.splitlines()
    assert "from a text file to a served language model" in lines[3]
    assert len(lines) < 600
    ours = [line for line in lines if "with_traceback" not in line and "__exit__" not in line]
    assert max(map(len, ours)) < 140
    for name in topkapi.__all__:
        assert name in text
    assert "top_k=None" in text and "learning_rate=0.001" in text
    fields = pydoc.render_doc(topkapi.DecodingFields, renderer=pydoc.plaintext)
    missing = [each.name for each in PARAMETERS if f"{each.name}: " not in fields]
    assert missing == [], "python -m topkapi.python.declaring writes them into python/decoding_fields.py"


def test_signatures_have_every_parameter() -> None:
    names = [each.name for each in PARAMETERS]
    for method in ASKING:
        parameters = inspect.signature(getattr(topkapi.Model, method)).parameters
        assert [name for name in parameters if name in names] == names
        assert parameters["top_k"].annotation == "int | None"
        assert parameters["top_k"].kind is inspect.Parameter.KEYWORD_ONLY
    scored = inspect.signature(topkapi.Model.score).parameters.keys() - {"self"}
    assert scored == score_schemas.ScoreRequest.model_fields.keys() - {"model", "stream", "resumable"}
    assert inspect.signature(topkapi.Model.ascore).parameters.keys() - {"self"} == scored
    recipes: dict[Any, Any] = {
        topkapi.pretrain: PretrainRecipe, topkapi.finetune: FinetuneRecipe, topkapi.dpo: DpoRecipe,
        topkapi.kto: KtoRecipe,
    }  # fmt: skip
    for function, recipe in recipes.items():
        given = inspect.signature(function).parameters
        assert given.keys() - {"recipe", "resume"} == recipe.model_fields.keys()
        assert all(given[name].default == field.default for name, field in recipe.model_fields.items())


def test_load_takes_the_settings_of_the_commands_that_compute() -> None:
    parameters = inspect.signature(topkapi.load).parameters
    assert parameters.keys() - {"checkpoint"} == set(COMPUTING)
    assert all(f"'{name}'" in parameters["dtype"].annotation or f'"{name}"' in parameters["dtype"].annotation
               for name in get_args(DtypeName))  # fmt: skip


def test_evaluate_takes_what_the_command_does() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_evaluate(parser.add_subparsers())
    (actions,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    flags = {action.dest for action in actions.choices["evaluate"]._actions} - {"help"}
    assert inspect.signature(topkapi.evaluate).parameters.keys() == flags


def test_the_declared_keywords_are_the_table_and_the_recipes() -> None:
    for name, text in declaring.files().items():
        assert (declaring.HERE / name).read_text() == text, "python -m topkapi.python.declaring writes them"
    assert get_type_hints(topkapi.DecodingFields).keys() == {each.name for each in PARAMETERS}


def test_results_have_what_answers_have() -> None:
    """What HTTP tells of a token, a trace or a score, Python tells by the same names."""
    pairs: list[tuple[Any, Any]] = [
        (topkapi.Token, schemas.TokenLogprobs), (topkapi.TokenTrace, schemas.TokenTrace),
        (topkapi.Usage, schemas.Usage), (topkapi.Candidate, schemas.Candidate),
        (topkapi.Score, score_schemas.ScoreResult), (topkapi.ScoredToken, score_schemas.ScoredToken),
    ]  # fmt: skip
    for ours, theirs in pairs:
        assert ours.__dataclass_fields__.keys() == theirs.model_fields.keys(), ours
