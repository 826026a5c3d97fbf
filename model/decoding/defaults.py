"""The decoding defaults of a checkpoint: what it stores, and tame ones for a conversation where it stores none."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

from topkapi.model.decoding.contradictions import check_tokens_exist
from topkapi.model.decoding.parameters import BY_NAME, check, from_generation_config
from topkapi.model.decoding.table import TRUNCATIONS
from topkapi.model.decoding.words import Words
from topkapi.model.errors import CheckpointError, InvalidRequest

CHAT_DEFAULTS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05}
"""What a conversation is sampled with where the checkpoint says nothing (docs/LOG.md has the measurement): small
models, sampled as they are, answer what nobody would."""


def decoding_defaults(generation: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """The defaults that a request is answered with, by the content of `generation_config.json`.

    With `chat`, for a conversation, `CHAT_DEFAULTS` take the place of the table's where the file says nothing of how
    tokens are drawn: no temperature, no truncation, no `do_sample: false`.
    """
    stored = from_generation_config(generation)
    drawn = {"temperature", "mirostat", *TRUNCATIONS} & stored.keys()
    return stored if drawn or not chat else CHAT_DEFAULTS | stored


def check_generation_config(generation: Mapping[str, Any], vocab_size: int, where: str) -> None:
    """Raise `CheckpointError` naming the field for a stored default that no request could be answered with.

    `where` is the file it stands in. A default that only contradicts another one, or a request, is no error: it gives
    way.
    """
    for name, value in from_generation_config(generation).items():
        called = BY_NAME[name].stored or name
        try:
            checked = check(BY_NAME[name], value)
            if isinstance(checked, list):
                ids = chain(*(checked.sequences or ())) if isinstance(checked, Words) else checked
                check_tokens_exist(name, list(ids), vocab_size)
        except InvalidRequest as error:
            raise CheckpointError(
                f"{where}: {error.message.replace(name, called)}",
                field=called,
                hint="correct that default there, or take it out",
            ) from None
