"""Topkapi: from a text file to a served language model.

Load a checkpoint and ask it:

    import topkapi

    model = topkapi.load("checkpoints/topkapi-chat")
    print(model.chat("What is the capital of France?"))
    print(model.generate("Once upon a time", max_tokens=40, top_k=50, seed=1))
    print(model.score("The cat sat on the mat.").perplexity)

Train one on your own text:

    run = topkapi.pretrain(data="book.txt", model="tiny", epochs=3, out="runs/book")
    run.plot().save("curve.png")
    print(run.load().generate("The", max_tokens=20))

`load` gives a `Model`, whose answers are texts that know how they came about: help(topkapi.Generated). Every decoding
parameter is explained by help(topkapi.DecodingFields). `pretrain`, `finetune`, `dpo` and `kto` give a `Run`; their
keywords are explained by help(topkapi.PretrainFields), FinetuneFields, DpoFields and KtoFields. `evaluate` gives
figures with their intervals. What the user can mend is raised as `TopkapiError`, with a `hint`. More stands in
docs/python.md.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from topkapi.model.errors import TopkapiError as TopkapiError
    from topkapi.python.answers import AsyncStream as AsyncStream
    from topkapi.python.answers import Stream as Stream
    from topkapi.python.decoding_fields import DecodingFields as DecodingFields
    from topkapi.python.dpo_fields import DpoFields as DpoFields
    from topkapi.python.evaluating import Evaluation as Evaluation
    from topkapi.python.evaluating import evaluate as evaluate
    from topkapi.python.finetune_fields import FinetuneFields as FinetuneFields
    from topkapi.python.kto_fields import KtoFields as KtoFields
    from topkapi.python.model import Model as Model
    from topkapi.python.model import load as load
    from topkapi.python.pretrain_fields import PretrainFields as PretrainFields
    from topkapi.python.results import Candidate as Candidate
    from topkapi.python.results import Generated as Generated
    from topkapi.python.results import Piece as Piece
    from topkapi.python.results import Score as Score
    from topkapi.python.results import ScoredToken as ScoredToken
    from topkapi.python.results import Scores as Scores
    from topkapi.python.results import Token as Token
    from topkapi.python.results import TokenTrace as TokenTrace
    from topkapi.python.results import Trace as Trace
    from topkapi.python.results import Usage as Usage
    from topkapi.python.runs import Plot as Plot
    from topkapi.python.runs import Run as Run
    from topkapi.python.table import Table as Table
    from topkapi.python.training import dpo as dpo
    from topkapi.python.training import finetune as finetune
    from topkapi.python.training import kto as kto
    from topkapi.python.training import pretrain as pretrain
    from topkapi.service.version import VERSION as __version__  # noqa: F401

# Where names lie: each is imported when it is first used, for torch alone takes seconds.
_NAMES = {
    "topkapi.model.errors": ("TopkapiError",),
    "topkapi.python.answers": ("AsyncStream", "Stream"),
    "topkapi.python.decoding_fields": ("DecodingFields",),
    "topkapi.python.dpo_fields": ("DpoFields",),
    "topkapi.python.evaluating": ("Evaluation", "evaluate"),
    "topkapi.python.finetune_fields": ("FinetuneFields",),
    "topkapi.python.kto_fields": ("KtoFields",),
    "topkapi.python.model": ("Model", "load"),
    "topkapi.python.pretrain_fields": ("PretrainFields",),
    "topkapi.python.results": (
        "Candidate", "Generated", "Piece", "Score", "ScoredToken", "Scores", "Token", "TokenTrace", "Trace", "Usage",
    ),
    "topkapi.python.runs": ("Plot", "Run"),
    "topkapi.python.table": ("Table",),
    "topkapi.python.training": ("dpo", "finetune", "kto", "pretrain"),
}  # fmt: skip
_LIES_IN = {name: module for module, names in _NAMES.items() for name in names}

# What help(topkapi) lists, and `import *` takes: what one begins with. The other names are what these return.
__all__ = ["Evaluation", "Model", "Run", "TopkapiError", "dpo", "evaluate", "finetune", "kto", "load", "pretrain"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found: Any = import_module("topkapi.service.version").VERSION
    elif name in _LIES_IN:
        found = getattr(import_module(_LIES_IN[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(
        {"__version__", *_LIES_IN, *(name for name in globals() if not name.startswith("_") or name[:2] == "__")}
    )
