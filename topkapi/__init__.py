"""Topkapi: from a text file to a served language model.

Load a checkpoint and ask it:

    import topkapi

    model = topkapi.load("checkpoints/topkapi-chat")
    print(model.chat("What is the capital of France?"))
    print(model.generate("Once upon a time", max_tokens=40, top_k=50, seed=1))
    print(model.score("The cat sat on the mat.").perplexity)

Train one on your own text:

    run = topkapi.pretrain(data="book.txt", model="tiny", epochs=3, out="runs/book")
    run.plot()
    print(run.load().generate("The", max_tokens=20))

`load` gives a `Model`: help(topkapi.Model) has its methods, help(topkapi.DecodingFields) every decoding parameter.
`pretrain`, `finetune` and `dpo` give a `Run`, `evaluate` figures with their intervals. What the user can mend is raised
as `TopkapiError`, with a `hint`. More stands in docs/python.md; `topkapi --help` has the same for the terminal.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from topkapi.model.errors import TopkapiError
    from topkapi.python.answers import AsyncStream, Stream
    from topkapi.python.decoding_fields import DecodingFields
    from topkapi.python.evaluating import Evaluation, evaluate
    from topkapi.python.model import Model, load
    from topkapi.python.results import Generated, Piece, Score, Scores, Token, TokenTrace, Trace, Usage
    from topkapi.python.runs import Run
    from topkapi.python.table import Table
    from topkapi.python.training import dpo, finetune, pretrain
    from topkapi.service.version import VERSION as __version__

# Where each name lies: it is imported when it is first used, for torch alone takes seconds.
_LIES_IN = {
    **dict.fromkeys(("Model", "load"), "topkapi.python.model"),
    **dict.fromkeys(("dpo", "finetune", "pretrain"), "topkapi.python.training"),
    **dict.fromkeys(("Evaluation", "evaluate"), "topkapi.python.evaluating"),
    **dict.fromkeys(
        ("Generated", "Piece", "Score", "Scores", "Token", "TokenTrace", "Trace", "Usage"), "topkapi.python.results"
    ),
    **dict.fromkeys(("AsyncStream", "Stream"), "topkapi.python.answers"),
    "DecodingFields": "topkapi.python.decoding_fields",
    "Run": "topkapi.python.runs",
    "Table": "topkapi.python.table",
    "TopkapiError": "topkapi.model.errors",
}

__all__ = [
    "AsyncStream", "DecodingFields", "Evaluation", "Generated", "Model", "Piece", "Run", "Score", "Scores", "Stream",
    "Table", "Token", "TokenTrace", "TopkapiError", "Trace", "Usage", "__version__", "dpo", "evaluate", "finetune",
    "load", "pretrain",
]  # fmt: skip


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
    return sorted({*__all__, *(name for name in globals() if name.startswith("__") or name in ("model", "training"))})
