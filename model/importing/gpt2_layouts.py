"""GPT-2's architecture in the layouts of those who teach it: the book's and nanoGPT's.

Sebastian Raschka, "Build a Large Language Model (From Scratch)", chapters 4, 5 and 7 (rasbt/LLMs-from-scratch,
`GPTModel`); Andrej Karpathy, nanoGPT (`GPT` in model.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from topkapi.model.errors import CheckpointError
from topkapi.model.importing.options import Network, Options, count_layers, heads_of
from topkapi.model.importing.source import Source, check_names

_BOOK = re.compile(
    r"(tok_emb|pos_emb|out_head)\.weight|final_norm\.(scale|shift)"
    r"|trf_blocks\.\d+\.(att\.(W_query|W_key|W_value|out_proj)\.(weight|bias)|att\.mask|ff\.layers\.[02]\.(weight|bias)"
    r"|norm[12]\.(scale|shift))"
)
_BOOK_LAYER = {
    "att.W_query": "self_attn.q_proj", "att.W_key": "self_attn.k_proj", "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj", "ff.layers.0": "mlp.up_proj", "ff.layers.2": "mlp.down_proj",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip
_KINDS = {"scale": "weight", "shift": "bias", "weight": "weight", "bias": "bias"}

_NANO = re.compile(
    r"(lm_head|transformer\.(wte|wpe))\.weight|transformer\.ln_f\.(weight|bias)"
    r"|transformer\.h\.\d+\.((ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)|attn\.(masked_)?bias)"
)
_NANO_LAYER = {
    "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
}  # fmt: skip
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_BIASED = ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
"""Modules of a layer that have a bias in GPT-2, whatever was trained."""


def is_book(source: Source) -> bool:
    """Whether it has the names of the book's `GPTModel`."""
    return "tok_emb.weight" in source.shapes and any(name.startswith("trf_blocks.0.att.") for name in source.shapes)


def read_book(source: Source, options: Options) -> Network:
    """The book's `GPTModel`. Raises `CheckpointError` for variants of it that compute something else."""
    shapes = source.shapes
    if "out_head.bias" in shapes or shapes.get("out_head.weight", [0])[0] < min(64, shapes["tok_emb.weight"][0]):
        raise CheckpointError(
            f"{source.path} is a classifier (chapter 6 of the book), which writes no text", hint="import a GPT instead"
        )
    check_names(source, _BOOK, "the book's GPTModel")
    for name in ("pos_emb.weight", "out_head.weight", "trf_blocks.0.ff.layers.0.weight"):
        if name not in shapes:
            raise CheckpointError(f"{source.path} lacks {name}, which the book's GPTModel has")
    vocabulary, hidden = shapes["tok_emb.weight"]
    layers = count_layers(list(shapes), "trf_blocks.")
    tied = torch.equal(source.tensor("tok_emb.weight"), source.tensor("out_head.weight"))
    config = _config(
        vocabulary, hidden, layers, heads_of(hidden, None, options), shapes["pos_emb.weight"][0],
        shapes["trf_blocks.0.ff.layers.0.weight"][0], qkv_bias="trf_blocks.0.att.W_query.bias" in shapes, tied=tied,
        exact=options.gelu == "exact",
    )  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "embed_tokens.weight", source.tensor("tok_emb.weight")
        yield "embed_positions.weight", source.tensor("pos_emb.weight")
        for name in shapes:
            if name.startswith("final_norm."):
                yield f"norm.{_KINDS[name.rpartition('.')[2]]}", source.tensor(name)
            elif name.startswith("trf_blocks.") and not name.endswith("att.mask"):
                _, layer, rest = name.split(".", 2)
                module, _, kind = rest.rpartition(".")
                yield f"layers.{layer}.{_BOOK_LAYER[module]}.{_KINDS[kind]}", source.tensor(name)
        if not tied:
            yield "lm_head.weight", source.tensor("out_head.weight")

    assumed = () if options.heads else (f"{config['n_head']} heads, as GPT-2 of that size has them",)
    return Network("the book's GPTModel", config, tensors, assumed)


def is_nanogpt(source: Source) -> bool:
    """Whether it has nanoGPT's names, and matrices that are not transposed as Hugging Face's GPT-2 has them."""
    hidden = source.shapes.get("transformer.wte.weight", [0, 0])[1]
    return (
        source.shapes.get("transformer.h.0.attn.c_attn.weight") == [3 * hidden, hidden]
        and "model_type" not in source.facts
    )


def read_nanogpt(source: Source, options: Options) -> Network:
    """nanoGPT's `ckpt.pt`, or the state of its `GPT` alone. Raises `CheckpointError` for other code's variants."""
    check_names(source, _NANO, "nanoGPT's GPT")
    shapes = source.shapes
    if "transformer.wpe.weight" not in shapes:
        raise CheckpointError(f"{source.path} lacks transformer.wpe.weight, which nanoGPT's GPT has")
    arguments = _mapping(source.facts.get("model_args"))
    settings = _mapping(source.facts.get("config"))
    vocabulary, hidden = shapes["transformer.wte.weight"]
    layers = count_layers(list(shapes), "transformer.h.")
    biased = "transformer.h.0.attn.c_attn.bias" in shapes
    head = "lm_head.weight" if "lm_head.weight" in shapes else "transformer.wte.weight"
    tied = torch.equal(source.tensor("transformer.wte.weight"), source.tensor(head))
    for name, found in (("n_layer", layers), ("n_embd", hidden), ("vocab_size", vocabulary)):
        if arguments.get(name, found) != found:
            raise CheckpointError(
                f"{source.path}: model_args say {name} {arguments[name]}, and the tensors {found}", field=name,
                hint="they belong to different networks",
            )  # fmt: skip
    # Until May 2023 nanoGPT computed GELU by tanh, since then exactly; the file does not say which.
    exact = options.gelu != "tanh"
    config = _config(
        vocabulary, hidden, layers, heads_of(hidden, arguments.get("n_head"), options),
        shapes["transformer.wpe.weight"][0], shapes["transformer.h.0.mlp.c_fc.weight"][0], qkv_bias=biased, tied=tied,
        exact=exact,
    )  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "embed_tokens.weight", source.tensor("transformer.wte.weight")
        yield "embed_positions.weight", source.tensor("transformer.wpe.weight")
        if not tied:
            yield "lm_head.weight", source.tensor("lm_head.weight")
        yield from _norm(source, "transformer.ln_f", "norm", hidden)
        for name in shapes:
            if not name.startswith("transformer.h.") or name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            if module == "attn.c_attn":
                for projection, part in zip(_PROJECTIONS, source.tensor(name).chunk(3), strict=True):
                    yield f"layers.{layer}.self_attn.{projection}.{kind}", part
            else:
                yield f"layers.{layer}.{_NANO_LAYER[module]}.{kind}", source.tensor(name)
        if not biased:
            # Without biases is with biases of zero.
            for number, module in product(range(layers), _BIASED):
                size = config["n_inner"] if module == "mlp.up_proj" else hidden
                yield f"layers.{number}.{module}.bias", torch.zeros(size)

    assumed = (f"GELU {'exact' if exact else 'by tanh'}, as nanoGPT does {'since' if exact else 'before'} May 2023",)
    dataset = settings.get("dataset")
    return Network(
        "nanoGPT's GPT", config, tensors, () if options.gelu else assumed,
        dataset=dataset if isinstance(dataset, str) else None,
    )  # fmt: skip


def _norm(source: Source, theirs: str, ours: str, hidden: int) -> Iterator[tuple[str, Tensor]]:
    yield f"{ours}.weight", source.tensor(f"{theirs}.weight")
    bias = f"{theirs}.bias"
    yield f"{ours}.bias", source.tensor(bias) if bias in source.shapes else torch.zeros(hidden)


def _config(
    vocabulary: int,
    hidden: int,
    layers: int,
    heads: int,
    context: int,
    inner: int,
    *,
    qkv_bias: bool,
    tied: bool,
    exact: bool,
) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": context,
        "n_inner": inner,
        "activation_function": "gelu" if exact else "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "qkv_bias": qkv_bias,
        "tie_word_embeddings": tied,
        "resid_pdrop": 0.0,
    }


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
