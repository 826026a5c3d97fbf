"""The page docs/families.md, written from the table of families: `python -m topkapi.model.storage.families_page`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from topkapi.model.config import ModelConfig
from topkapi.model.config_rope import ROPE_FIELDS
from topkapi.model.core_fields import beyond_core
from topkapi.model.families import BEFORE, FAMILIES, Family
from topkapi.model.storage.layouts import LAYOUTS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
_SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}  # fmt: skip

_TOP = """# Families of networks

*Written from the code by `python -m topkapi.model.storage.families_page`.*

Every family is a row of `model/families.py` and computed by the one `Decoder`; each gives transformers' logits
(float32, within 0.0001 of the largest) from the same weights, read at once, in pieces from the cache, and as
fine-tuning reads it. All of them are read from and written to Hugging Face directories, served, scored, speculated
with, and tuned by `finetune`, `dpo` and `kto` with all weights or with LoRA, QLoRA and DoRA, whose adapters PEFT opens.
What a configuration asks for beyond this is refused by the field's name; another `model_type` is refused with the list
of these.

"""
_NOTES = """
**Windows.** A layer with a window of *n* attends to *n* tokens, its own included, as in transformers. Beginnings that
requests share, speculation and scoring hold to it. `sliding_window` counts in every layer of mistral and phi3; in
qwen2, qwen3 and smollm3 where `use_sliding_window` is true, in the layers that `layer_types` names, or else those
from `max_window_layers` on (smollm3: those without rotary positions); in the gemma families in the layers of
`layer_types`, or else all but every second (gemma2) or sixth (gemma3_text, `sliding_window_pattern`). Keys outside of
a window stay in the cache, so a window saves time and no memory.

**Rotary positions.** {kinds}: with their factors of attention, as transformers 5 computes them. `dynamic` changes
nothing up to `max_position_embeddings`, and no longer text is computed. `longrope` has two sets of angles: up to
`original_max_position_embeddings` tokens the short factors, and beyond that transformers reads every token anew with
the long ones. Angles in a cache do not change, so the context of such a model is `original_max_position_embeddings`
(4096 for Phi-3.5 and Phi-4 mini), within which it is exact; a longer prompt is refused as too long. `proportional`
and positions in several dimensions are refused.

**What computes.** The native core computes every family: windows, soft caps, partial and local rotary positions,
norms wherever they stand, and all multipliers are data of the same kernels. PyTorch computes what the core does not
know (`model/core_fields.py`), and everything where there is no core; `/models` and `/props` say which it is. `--dtype
int8` is then PyTorch's, where the machine has a product for it, and `int4`, `w8a8` and `w4a8` are refused.

**GGUF.** Files of these architectures are read by llama.cpp's rules; the window that a phi3 file names is computed,
which llama.cpp leaves out. Refused when writing, by the field's name: what llama.cpp would compute otherwise, as a
window in mistral or qwen2, biases where its architecture has none, or a `query_pre_attn_scalar` that is not the size
of a head.

**Images.** Of Gemma 3 with images (`model_type` gemma3) the text's network is read, as transformers computes it for
messages without any; images in messages are refused.

**nanochat.** Its networks of October 2025 to 10 January 2026, d32 among them, are the family `nanochat`, as
transformers computes them; `topkapi import` takes its own files ([formats.md](formats.md#from-other-trainers)). Later
ones have more, each of which is refused by its name: since 11 January 2026 residuals scaled layer by layer into which
the embeddings flow (`resid_lambdas`, `x0_lambdas`) and windows (`window_pattern`), since 16 January values that are
mixed with embeddings of the tokens (`value_embeds`), since 9 March another base of positions and scaled queries and
keys, and since 14 March a part of each token's embedding that goes to the next one (`smear_gate`) and a state of a
middle layer that is subtracted at the end (`backout_lambda`). All but the smear would be data of a layer; that needs
the token before a piece of text, which the network is not given where a text is read in pieces.
"""


def page() -> str:
    """The whole page."""
    kinds = ", ".join(f"`{kind}`" for kind in ROPE_FIELDS)
    return _TOP + "\n".join(_table()) + "\n" + _NOTES.format(kinds=kinds)


def _table() -> Iterator[str]:
    yield "| `model_type` | models | what sets it apart | computed by | GGUF | LoRA targets that go together |"
    yield "|---|---|---|---|---|---|"
    for name, traits in FAMILIES.items():
        layout = LAYOUTS.get(name)
        joined = (
            [", ".join(part.rpartition(".")[2] for part in parts) for parts in layout.joined.values()] if layout else []
        )
        core = "PyTorch" if beyond_core(_plain(name)) else "native core"
        gguf = f"`{traits.gguf}`" if traits.gguf else "none"
        cells = (f"`{name}`", traits.models, "; ".join(_apart(traits)), core, gguf, "; ".join(joined))
        yield f"| {' | '.join(cells)} |"


def _plain(family: str) -> ModelConfig:
    """The family as it is where its configuration says nothing but sizes."""
    return ModelConfig.from_hugging_face({"model_type": family, **_SIZES})


def _apart(traits: Family) -> Iterator[str]:
    if traits.learned_positions:
        yield "learned positions"
    if traits.layer_norm:
        yield "LayerNorm"
    if traits.norms != BEFORE:
        before = traits.norms.before_attention is not None
        yield "norms before and behind each part" if before else "norms behind each part alone"
    if traits.norm_offset:
        yield "norms' weights count from 1"
    if traits.weightless_norms:
        yield "norms without weights"
    if traits.embedding_norm:
        yield "normalised embeddings"
    if not traits.gated_mlp or traits.activation != "silu":
        kinds = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "silu": "SiLU", "relu_squared": "squared ReLU"}
        kind = kinds[traits.activation]
        yield kind + (" with a gate" if traits.gated_mlp else " without a gate")
    if traits.qkv_bias:
        yield "biases of queries, keys and values"
    if traits.qk_norm or traits.qk_norm_whole:
        yield "normalised queries and keys" + (", all heads together" if traits.qk_norm_whole else "")
    if traits.window is not None:
        yield "windows"
    if any("softcap" in name for name in traits.numbers):
        both = "attention_softcap" in traits.numbers
        yield "soft caps of " + ("attention and logits" if both else "logits")
    if traits.scaled_embeddings:
        yield "scaled embeddings"
    if traits.query_scalar:
        yield "`query_pre_attn_scalar`"
    if traits.local_rope_theta is not None:
        yield "positions of their own in layers with a window"
    if traits.partial_rotary is not None:
        yield "part of a head rotated"
    if traits.unrotated_layers:
        yield "layers without positions"
    if traits.rotated_backwards:
        yield "positions turned backwards"
    if traits.parallel_residual:
        yield "attention and feed-forward side by side"
    if "embedding_multiplier" in traits.numbers:
        yield "multipliers of embeddings, scores, residuals and logits"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
