"""The keys of a GGUF file's header: which of them Topkapi computes with, and what becomes of the others.

The rules are llama.cpp's for these architectures. A key that is neither read nor known to change nothing is refused by
its name, unless its value is zero, false or empty: a later llama.cpp may compute with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from topkapi.model.errors import CheckpointError

READ = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.type",
)
"""What `model.storage.gguf_configuration` reads, after the architecture's name."""

READ_OF: dict[str, tuple[str, ...]] = {
    "gemma2": ("attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
               "final_logit_softcapping"),
    "gemma3": ("attention.sliding_window", "attention.sliding_window_pattern", "final_logit_softcapping",
               "rope.freq_base_swa"),
    "phi3": ("attention.sliding_window",),
    "gptneox": ("use_parallel_residual",),
    "granite": ("attention.scale", "embedding_scale", "logit_scale", "residual_scale", "rope.scaling.finetuned"),
}  # fmt: skip
"""What is read in one architecture alone."""

NO_EFFECT = {
    "classifier.output_labels": "names of a classifier's outputs",
    "pooling_type": "how embeddings of texts are made",
    "rope.scaling.finetuned": "a record of how the model was made",
    "rope.scaling.original_context_length": "read for yarn and longrope",
    "rope.scaling.yarn_attn_factor": "read for yarn alone",
    "rope.scaling.yarn_beta_fast": "read for yarn alone",
    "rope.scaling.yarn_beta_slow": "read for yarn alone",
    "rope.scaling.yarn_ext_factor": "read for yarn alone",
    "rope.scaling.yarn_log_multiplier": "read for yarn alone",
    "vocab_size": "the embedding's rows and the tokens are counted",
}
"""What changes nothing in these architectures, after the architecture's name, and why."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
}
"""What changes nothing with one of these values, after the architecture's name."""

OTHER_NEUTRAL: dict[str, tuple[object, ...]] = {
    "general.sampling.sequence": (),
    "general.type": ("model",),
    "tokenizer.ggml.add_eos_token": (False,),
    "tokenizer.ggml.add_sep_token": (False,),
}
"""Keys outside the architecture that are refused unless they have one of these values or are empty."""

OTHER_KINDS = ("adapter.", "clip.", "diffusion.", "imatrix.", "xielu.")
"""Beginnings of the keys of files that hold something else than a language model that continues texts."""


def check_keys(metadata: Mapping[str, Any], architecture: str) -> None:
    """Refuse every key that would change the result and is not computed with. Raises `CheckpointError` naming it."""
    for key, value in metadata.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key:
            refused = key in OTHER_NEUTRAL or key.startswith(OTHER_KINDS)
            refused = refused and value not in OTHER_NEUTRAL.get(key, ()) and not _nothing(value)
        elif name in READ_OF.get(architecture, ()):
            refused = False
        elif name == "rope.scaling.attn_factor":
            scaling = metadata.get(f"{architecture}.rope.scaling.type")
            read = scaling == "yarn" or architecture == "phi3"
            refused = not (read or value == 1.0 or _nothing(value))
        elif name == "attention.scale":
            refused = not (_nothing(value) or _is_usual_scale(metadata, architecture, value))
        else:
            known = name in READ or name in NO_EFFECT or value in NEUTRAL.get(name, ())
            refused = not known and (name in ("attention.causal",) or not _nothing(value))
        if refused:
            raise CheckpointError(
                f"the GGUF file asks for {key} = {value!r:.200}, which is not supported",
                field=key,
                hint="load the original Hugging Face directory, if its family is supported",
            )


def _nothing(value: object) -> bool:
    """Whether the value means that what the key is about is not there: zero, false, empty or a list of these."""
    return all(map(_nothing, value)) if isinstance(value, list) else not value


def _is_usual_scale(metadata: Mapping[str, Any], architecture: str, value: object) -> bool:
    head = metadata.get(f"{architecture}.attention.key_length")
    hidden = metadata.get(f"{architecture}.embedding_length")
    heads = metadata.get(f"{architecture}.attention.head_count")
    if head is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head = hidden // heads
    usual = isinstance(head, int) and isinstance(value, float) and head > 0
    return usual and math.isclose(value, head**-0.5, rel_tol=1e-5)  # type: ignore[arg-type, operator]
