"""What other trainers wrote becomes a checkpoint that computes what their own code computes.

The references here are written after the documented architectures, not after ours: the book's chapter 4, nanoGPT's
model.py, llama2.c's model.py and litgpt's model.py.
"""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from tests.hub import connect, running_hub
from topkapi.model.errors import CheckpointError, InvalidRequest
from topkapi.model.importing.importing import import_checkpoint
from topkapi.model.importing.options import Options, heads_of
from topkapi.model.importing.restricted import read
from topkapi.model.storage.checkpoint import load_checkpoint
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.service.commands.cli import main

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n"
CHARACTERS = sorted(set(TEXT))
HIDDEN, LAYERS, HEADS, CONTEXT = 32, 2, 4, 80

State = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def numbers(*shape: int, scale: float = 0.25) -> Tensor:
    return torch.randn(*shape) * scale


def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    return normal * weight + (0 if bias is None else bias)


def root_mean_square_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (heads, length, size) each, as chapter 3 writes it, heads side by side at the end."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    hidden = torch.triu(torch.ones(scores.shape[-2:], dtype=torch.bool), diagonal=1)
    mixed = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v
    return mixed.transpose(0, 1).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(0, 1)


def gelu_by_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def book(*, qkv_bias: bool, vocabulary: int = len(CHARACTERS)) -> tuple[State, Forward]:
    """The book's GPTModel and what it computes for a row of ids."""
    state: State = {"tok_emb.weight": numbers(vocabulary, HIDDEN), "pos_emb.weight": numbers(CONTEXT, HIDDEN)}
    for layer in range(LAYERS):
        at = f"trf_blocks.{layer}"
        for name in ("W_query", "W_key", "W_value", "out_proj"):
            state[f"{at}.att.{name}.weight"] = numbers(HIDDEN, HIDDEN)
            if qkv_bias or name == "out_proj":
                state[f"{at}.att.{name}.bias"] = numbers(HIDDEN)
        state[f"{at}.att.mask"] = torch.triu(torch.ones(CONTEXT, CONTEXT), diagonal=1)
        state |= {
            f"{at}.ff.layers.0.weight": numbers(4 * HIDDEN, HIDDEN),
            f"{at}.ff.layers.0.bias": numbers(4 * HIDDEN),
        }
        state |= {f"{at}.ff.layers.2.weight": numbers(HIDDEN, 4 * HIDDEN), f"{at}.ff.layers.2.bias": numbers(HIDDEN)}
        for name in ("norm1", "norm2"):
            state |= {f"{at}.{name}.scale": 1 + numbers(HIDDEN), f"{at}.{name}.shift": numbers(HIDDEN)}
    state |= {"final_norm.scale": 1 + numbers(HIDDEN), "final_norm.shift": numbers(HIDDEN)}
    state["out_head.weight"] = numbers(vocabulary, HIDDEN)

    def forward(ids: Tensor) -> Tensor:
        x = state["tok_emb.weight"][ids] + state["pos_emb.weight"][: len(ids)]
        for layer in range(LAYERS):
            at = f"trf_blocks.{layer}"

            def linear(x: Tensor, name: str, at: str = at) -> Tensor:
                return x @ state[f"{at}.{name}.weight"].T + state.get(f"{at}.{name}.bias", torch.tensor(0.0))

            y = norm(x, state[f"{at}.norm1.scale"], state[f"{at}.norm1.shift"])
            q, k, v = (heads(linear(y, f"att.{name}"), HEADS) for name in ("W_query", "W_key", "W_value"))
            x = x + linear(attention(q, k, v), "att.out_proj")
            y = norm(x, state[f"{at}.norm2.scale"], state[f"{at}.norm2.shift"])
            x = x + linear(gelu_by_tanh(linear(y, "ff.layers.0")), "ff.layers.2")
        return norm(x, state["final_norm.scale"], state["final_norm.shift"]) @ state["out_head.weight"].T

    return state, forward


def nanogpt(*, bias: bool, activation: Callable[[Tensor], Tensor] = gelu) -> tuple[State, Forward]:
    """nanoGPT's GPT, its output matrix the embedding, and what it computes."""
    wte = numbers(len(CHARACTERS), HIDDEN)
    state: State = {"transformer.wte.weight": wte, "transformer.wpe.weight": numbers(CONTEXT, HIDDEN)}

    def add(name: str, *shape: int, around: float = 0.0) -> None:
        state[f"{name}.weight"] = around + numbers(*shape)
        if bias:
            state[f"{name}.bias"] = numbers(shape[0])

    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        add(f"{at}.ln_1", HIDDEN, around=1)
        add(f"{at}.attn.c_attn", 3 * HIDDEN, HIDDEN)
        add(f"{at}.attn.c_proj", HIDDEN, HIDDEN)
        add(f"{at}.ln_2", HIDDEN, around=1)
        add(f"{at}.mlp.c_fc", 4 * HIDDEN, HIDDEN)
        add(f"{at}.mlp.c_proj", HIDDEN, 4 * HIDDEN)
    add("transformer.ln_f", HIDDEN, around=1)
    state["lm_head.weight"] = wte

    def forward(ids: Tensor) -> Tensor:
        def linear(x: Tensor, name: str) -> Tensor:
            return functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

        def normal(x: Tensor, name: str) -> Tensor:
            return norm(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

        x = wte[ids] + state["transformer.wpe.weight"][: len(ids)]
        for layer in range(LAYERS):
            at = f"transformer.h.{layer}"
            q, k, v = (heads(part, HEADS) for part in linear(normal(x, f"{at}.ln_1"), f"{at}.attn.c_attn").chunk(3, -1))
            x = x + linear(attention(q, k, v), f"{at}.attn.c_proj")
            x = x + linear(activation(linear(normal(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")), f"{at}.mlp.c_proj")
        return normal(x, "transformer.ln_f") @ wte.T

    return state, forward


NANO_ARGUMENTS = {
    "n_layer": LAYERS, "n_head": HEADS, "n_embd": HIDDEN, "block_size": CONTEXT, "bias": True, "dropout": 0.2,
    "vocab_size": len(CHARACTERS),
}  # fmt: skip


def nanogpt_file(state: State, path: Path, prefix: str = "") -> Path:
    """A ckpt.pt as train.py writes it: the network, its optimiser's state, arguments and settings."""
    model = {prefix + name: tensor for name, tensor in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": numbers(4, 4)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save(
        {
            "model": model, "optimizer": optimizer, "model_args": NANO_ARGUMENTS, "iter_num": 5,
            "best_val_loss": torch.tensor(1.5), "config": {"dataset": "shakespeare_char", "out_dir": "out"},
        },
        path,
    )  # fmt: skip
    return path


def llama2c(kv_heads: int, *, tied: bool) -> tuple[State, Forward]:
    """llama2.c's Transformer under its own names, with rotary positions as complex numbers of neighbours."""
    inner, size, vocabulary = 48, HIDDEN // HEADS, 300
    state: State = {"tok_embeddings.weight": numbers(vocabulary, HIDDEN)}
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        state[f"{at}.attention.wq.weight"] = numbers(HIDDEN, HIDDEN)
        state[f"{at}.attention.wk.weight"] = numbers(kv_heads * size, HIDDEN)
        state[f"{at}.attention.wv.weight"] = numbers(kv_heads * size, HIDDEN)
        state[f"{at}.attention.wo.weight"] = numbers(HIDDEN, HIDDEN)
        state[f"{at}.feed_forward.w1.weight"] = numbers(inner, HIDDEN)
        state[f"{at}.feed_forward.w2.weight"] = numbers(HIDDEN, inner)
        state[f"{at}.feed_forward.w3.weight"] = numbers(inner, HIDDEN)
        for name in ("attention_norm", "ffn_norm"):
            state[f"{at}.{name}.weight"] = 1 + numbers(HIDDEN)
    state["norm.weight"] = 1 + numbers(HIDDEN)
    state["output.weight"] = state["tok_embeddings.weight"] if tied else numbers(vocabulary, HIDDEN)

    def rotate(x: Tensor) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(0, size, 2) / size)
        angles = torch.outer(torch.arange(x.shape[1]).float(), frequencies)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)

    def forward(ids: Tensor) -> Tensor:
        x = state["tok_embeddings.weight"][ids]
        for layer in range(LAYERS):
            at = f"layers.{layer}"
            y = root_mean_square_norm(x, state[f"{at}.attention_norm.weight"])
            q, k, v = (y @ state[f"{at}.attention.w{name}.weight"].T for name in "qkv")
            q, k, v = rotate(heads(q, HEADS)), rotate(heads(k, kv_heads)), heads(v, kv_heads)
            k, v = (each.repeat_interleave(HEADS // kv_heads, dim=0) for each in (k, v))
            x = x + attention(q, k, v) @ state[f"{at}.attention.wo.weight"].T
            y = root_mean_square_norm(x, state[f"{at}.ffn_norm.weight"])
            w1, w2, w3 = (state[f"{at}.feed_forward.w{number}.weight"] for number in (1, 2, 3))
            x = x + (functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
        return root_mean_square_norm(x, state["norm.weight"]) @ state["output.weight"].T

    return state, forward


def llama2c_bin(state: State, kv_heads: int, path: Path, version: int) -> Path:
    """The .bin that llama2.c's export.py writes."""
    tied = state["output.weight"] is state["tok_embeddings.weight"]
    vocabulary, inner = state["tok_embeddings.weight"].shape[0], state["layers.0.feed_forward.w1.weight"].shape[0]

    def all_layers(name: str) -> list[Tensor]:
        return [state[f"layers.{layer}.{name}.weight"] for layer in range(LAYERS)]

    attention_names = [f"attention.w{name}" for name in "qkvo"]
    feed_names = [f"feed_forward.w{number}" for number in (1, 2, 3)]
    sizes = (HIDDEN, inner, LAYERS, HEADS, kv_heads)
    if version == 0:
        head = struct.pack("iiiiiii", *sizes, vocabulary if tied else -vocabulary, CONTEXT)
        rotary = [torch.zeros(CONTEXT, HIDDEN // HEADS // 2)] * 2
        names = ["attention_norm", *attention_names, "ffn_norm", *feed_names]
        layers = [tensor for name in names for tensor in all_layers(name)]
        written = [state["tok_embeddings.weight"], *layers, state["norm.weight"], *rotary]
    else:
        head = struct.pack("Iiiiiiiii", 0x616B3432, version, *sizes, vocabulary, CONTEXT) + struct.pack("B", tied)
        head = head.ljust(256, b"\0")
        norms = [*all_layers("attention_norm"), *all_layers("ffn_norm"), state["norm.weight"]]
        layers = [tensor for name in (*attention_names, *feed_names) for tensor in all_layers(name)]
        written = [*norms, state["tok_embeddings.weight"], *layers]
    written += [] if tied else [state["output.weight"]]
    path.write_bytes(head + b"".join(tensor.numpy().astype("<f4").tobytes() for tensor in written))
    return path


def llama2c_vocabulary(path: Path) -> Path:
    """A tokenizer.bin of 300 entries: the usual first three, all bytes, and some letters and words."""
    pieces = [
        "<unk>",
        "\n<s>\n",
        "\n</s>\n",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        " t",
        "he",
        " the",
        " a",
        "in",
    ]
    pieces += [chr(code) for code in range(ord("a"), ord("a") + 26)] + [" "]
    pieces += [f"{first}e" for first in "bcdfgklmnp"][: 300 - len(pieces)]
    with path.open("wb") as file:
        file.write(struct.pack("I", max(map(len, pieces))))
        for index, piece in enumerate(pieces):
            encoded = piece.encode()
            file.write(struct.pack("fI", -float(index), len(encoded)) + encoded)
    return path


def litgpt(groups: int, *, legacy: bool, **changes: Any) -> tuple[State, dict[str, Any], Forward]:
    """litgpt's GPT with its model_config.yaml, in Llama's or Qwen's manner, and what it computes."""
    size, inner, vocabulary = 8, 48, 256
    settings: dict[str, Any] = {
        "name": "mine", "hf_config": {}, "block_size": CONTEXT, "n_layer": LAYERS, "n_embd": HIDDEN, "n_head": HEADS,
        "n_query_groups": groups, "head_size": size, "vocab_size": vocabulary, "padded_vocab_size": vocabulary,
        "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": inner, "bias": False,
        "parallel_residual": False, "rotary_percentage": 1.0, "norm_eps": 1e-5, "rope_base": 10_000,
        "lm_head_bias": False,
    } | changes  # fmt: skip
    state: State = {
        "lm_head.weight": numbers(vocabulary, HIDDEN),
        "transformer.wte.weight": numbers(vocabulary, HIDDEN),
    }
    state["transformer.ln_f.weight"] = 1 + numbers(HIDDEN)
    parts: list[tuple[Tensor, ...]] = []
    biases: list[tuple[Tensor, ...]] = []
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        state |= {f"{at}.{name}.weight": 1 + numbers(HIDDEN) for name in ("norm_1", "norm_2")}
        for kept, shape in ((parts, (HIDDEN,)), (biases, ())):
            kept.append(tuple(numbers(count * size, *shape) for count in (HEADS, groups, groups)))
        for kind, each in (("weight", parts[-1]), ("bias", biases[-1])):
            if kind == "weight" or settings.get("attn_bias"):
                grouped = [part.unflatten(0, (groups, -1, size)) for part in each]
                together = torch.cat(grouped, dim=1).flatten(0, 2) if legacy else torch.cat(each)
                state[f"{at}.attn.{'attn' if legacy else 'qkv'}.{kind}"] = together
        if settings.get("norm_qk"):
            state |= {f"{at}.attn.norm_{name}.weight": 1 + numbers(size) for name in "qk"}
        state[f"{at}.attn.proj.weight"] = numbers(HIDDEN, HEADS * size)
        state |= {f"{at}.mlp.{name}.weight": numbers(inner, HIDDEN) for name in ("fc_1", "fc_2")}
        state[f"{at}.mlp.proj.weight"] = numbers(HIDDEN, inner)

    def rotate(x: Tensor) -> Tensor:
        frequencies = 1.0 / (10_000 ** (torch.arange(0, size, 2).float() / size))
        angles = torch.outer(torch.arange(x.shape[1]) / settings.get("rope_condense_ratio", 1), frequencies).repeat(
            1, 2
        )
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(ids: Tensor) -> Tensor:
        x = state["transformer.wte.weight"][ids]
        for layer in range(LAYERS):
            at = f"transformer.h.{layer}"
            y = root_mean_square_norm(x, state[f"{at}.norm_1.weight"])
            added = biases[layer] if settings.get("attn_bias") else (0, 0, 0)
            q, k, v = (
                heads(y @ part.T + bias, count)
                for part, bias, count in zip(parts[layer], added, (HEADS, groups, groups), strict=True)
            )
            if settings.get("norm_qk"):
                q, k = (
                    root_mean_square_norm(each, state[f"{at}.attn.norm_{name}.weight"])
                    for name, each in (("q", q), ("k", k))
                )
            k, v = (each.repeat_interleave(HEADS // groups, dim=0) for each in (rotate(k), v))
            x = x + attention(rotate(q), k, v) @ state[f"{at}.attn.proj.weight"].T
            y = root_mean_square_norm(x, state[f"{at}.norm_2.weight"])
            gate, up, down = (state[f"{at}.mlp.{name}.weight"] for name in ("fc_1", "fc_2", "proj"))
            x = x + (functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
        return root_mean_square_norm(x, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T

    return state, settings, forward


def nanochat(kv_heads: int, vocabulary: int, rows: int) -> tuple[State, Forward]:
    """nanochat's GPT of 2025: no norm has a weight, positions turn backwards and come before the norms of a head."""
    inner, size = 4 * HIDDEN, HIDDEN // HEADS
    state: State = {"transformer.wte.weight": numbers(rows, HIDDEN), "lm_head.weight": numbers(rows, HIDDEN)}
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}"
        state[f"{at}.attn.c_q.weight"] = numbers(HIDDEN, HIDDEN)
        state[f"{at}.attn.c_k.weight"] = numbers(kv_heads * size, HIDDEN)
        state[f"{at}.attn.c_v.weight"] = numbers(kv_heads * size, HIDDEN)
        state[f"{at}.attn.c_proj.weight"] = numbers(HIDDEN, HIDDEN)
        state[f"{at}.mlp.c_fc.weight"] = numbers(inner, HIDDEN)
        state[f"{at}.mlp.c_proj.weight"] = numbers(HIDDEN, inner)

    def normal(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotated(x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
        first, second = x[..., : size // 2], x[..., size // 2 :]
        parts = [first * angles.cos() + second * angles.sin(), second * angles.cos() - first * angles.sin()]
        return torch.cat(parts, dim=-1)

    def forward(ids: Tensor) -> Tensor:
        x = normal(state["transformer.wte.weight"][ids])
        for layer in range(LAYERS):

            def linear(x: Tensor, name: str, at: str = f"transformer.h.{layer}") -> Tensor:
                return functional.linear(x, state[f"{at}.{name}.weight"])

            y = normal(x)
            q = normal(rotated(heads(linear(y, "attn.c_q"), HEADS)))
            k, v = (heads(linear(y, f"attn.c_{name}"), kv_heads) for name in "kv")
            k, v = (each.repeat_interleave(HEADS // kv_heads, dim=0) for each in (normal(rotated(k)), v))
            x = x + linear(attention(q, k, v), "attn.c_proj")
            x = x + linear(functional.relu(linear(normal(x), "mlp.c_fc")).square(), "mlp.c_proj")
        scores = normal(x) @ state["lm_head.weight"][:vocabulary].T
        return 15 * torch.tanh(scores / 15)

    return state, forward


def nanochat_file(state: State, directory: Path, kv_heads: int, vocabulary: int, **more: object) -> Path:
    """`model_000650.pt` and what nanochat writes beside it."""
    settings = {
        "sequence_len": CONTEXT, "vocab_size": vocabulary, "n_layer": LAYERS, "n_head": HEADS, "n_kv_head": kv_heads,
        "n_embd": HIDDEN,
    }  # fmt: skip
    torch.save(state, directory / "model_000650.pt")
    (directory / "meta_000650.json").write_text(json.dumps({"step": 650, "model_config": settings | more}))
    return directory / "model_000650.pt"


def agree(out: Path, forward: Forward, vocabulary: int) -> None:
    """The checkpoint has the logits of `forward` within 1e-5 and goes on with the same 50 tokens."""
    model = load_checkpoint(out).model
    ids = torch.randint(vocabulary, (24,), generator=torch.Generator().manual_seed(3))

    def ours(ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids[None], torch.arange(len(ids))[None])[0]
            return logits

    expected = forward(ids)
    assert (ours(ids) - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    greedy, reference = ids, ids
    for _ in range(50):
        greedy = torch.cat([greedy, ours(greedy)[-1].argmax()[None]])
        reference = torch.cat([reference, forward(reference)[-1].argmax()[None]])
    assert greedy.tolist() == reference.tolist()


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(11)


@pytest.fixture
def apart() -> None:
    """For tests in which files are read as they are: in a process of its own."""


@pytest.fixture(autouse=True)
def without_another_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that these tests wrote themselves are read in this process, which saves seconds for each."""
    if "apart" not in request.fixturenames:
        monkeypatch.setattr("topkapi.model.importing.source._run_apart", lambda path, out, size: read(path, out))


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_books_state_dict(qkv_bias: bool, whole: bool, tmp_path: Path) -> None:
    state, forward = book(qkv_bias=qkv_bias)
    stored = {"model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": []}} if whole else state
    torch.save(stored, tmp_path / "model.pth")
    characters = "".join(CHARACTERS)
    made = import_checkpoint(tmp_path / "model.pth", tmp_path / "out", Options(heads=HEADS, characters=characters))
    assert made.kind == "the book's GPTModel" and not made.assumed
    agree(tmp_path / "out", forward, len(CHARACTERS))


def test_the_books_heads_are_gpt2s_or_asked_for(tmp_path: Path) -> None:
    sizes = {768: 12, 1024: 16, 1280: 20, 1600: 25}
    assert {hidden: heads_of(hidden, None, Options()) for hidden in sizes} == sizes
    torch.save(book(qkv_bias=False)[0], tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="how many heads") as refused:
        import_checkpoint(tmp_path / "model.pth", tmp_path / "out", Options())
    assert "--heads N" in str(refused.value.hint) and not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"], "nothing half-made stays"


def test_the_books_vocabulary_is_gpt2s_and_its_output_matrix_may_be_the_embedding(tmp_path: Path) -> None:
    state, forward = book(qkv_bias=True, vocabulary=50_257)
    state["out_head.weight"] = state["tok_emb.weight"].clone()
    torch.save(state, tmp_path / "model.pth")
    made = import_checkpoint(tmp_path / "model.pth", tmp_path / "out", Options(heads=HEADS, chat_template="alpaca"))
    assert made.vocabulary == "GPT-2's, by its 50,257 entries" and made.chat
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config.tie_embeddings and loaded.config.end_token_ids == (50_256,)
    assert loaded.tokenizer.encode("Hello, I am") == [15496, 11, 314, 716]
    agree(tmp_path / "out", forward, 50_257)


@pytest.mark.parametrize(("bias", "prefix"), [(True, ""), (False, "_orig_mod."), (False, "module._orig_mod.")])
def test_nanogpts_checkpoint(bias: bool, prefix: str, tmp_path: Path) -> None:
    state, forward = nanogpt(bias=bias)
    source = nanogpt_file(state, tmp_path / "ckpt.pt", prefix)
    (tmp_path / "input.txt").write_text(TEXT * 3)
    made = import_checkpoint(source, tmp_path / "out", Options(data=(tmp_path / "input.txt",)))
    assert made.kind == "nanoGPT's GPT" and "GELU exact" in made.assumed[0]
    agree(tmp_path / "out", forward, len(CHARACTERS))
    tokenizer = load_checkpoint(tmp_path / "out").tokenizer
    index = {character: number for number, character in enumerate(CHARACTERS)}
    ids = tokenizer.encode(TEXT)
    assert ids == [index[character] for character in TEXT] and tokenizer.decode(ids) == TEXT
    with pytest.raises(InvalidRequest, match="characters that the checkpoint's vocabulary lacks"):
        tokenizer.encode("naïve")


def test_nanogpts_gelu_of_earlier_days_can_be_asked_for(tmp_path: Path) -> None:
    state, forward = nanogpt(bias=True, activation=gelu_by_tanh)
    source = nanogpt_file(state, tmp_path / "ckpt.pt")
    import_checkpoint(source, tmp_path / "out", Options(characters="".join(CHARACTERS), gelu="tanh"))
    agree(tmp_path / "out", forward, len(CHARACTERS))


def test_a_vocabulary_of_characters_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = nanogpt_file(nanogpt(bias=True)[0], tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert main(["import", str(source), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "meta.pkl, which would say, is a pickle and is never read" in said
    assert "--data data/shakespeare_char/input.txt" in said
    (tmp_path / "other.txt").write_text("abc")
    assert main(["import", str(source), str(tmp_path / "out"), "--data", str(tmp_path / "other.txt")]) == 2
    assert f"has 3 characters, and the network {len(CHARACTERS)} entries" in capsys.readouterr().err
    assert main(["import", str(source), str(tmp_path / "out"), "--tokenizer", "gpt2"]) == 2
    assert "the vocabulary gpt2 has 50,257 entries and the network only" in capsys.readouterr().err
    assert main(["import", str(source), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "meta.pkl")]) == 2
    assert "a pickle may run code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["ckpt.pt", "version 0", "version 1"])
@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, False)])
def test_llama2cs_files(form: str, kv_heads: int, tied: bool, tmp_path: Path) -> None:
    state, forward = llama2c(kv_heads, tied=tied)
    if form == "ckpt.pt":
        source = tmp_path / "ckpt.pt"
        arguments = {
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "n_kv_heads": kv_heads,
            "max_seq_len": CONTEXT,
        }
        torch.save({"model": state, "model_args": arguments | {"vocab_size": 300, "multiple_of": 4}}, source)
    else:
        source = llama2c_bin(state, kv_heads, tmp_path / "model.bin", int(form[-1]))
    llama2c_vocabulary(tmp_path / "tokenizer.bin")
    import_checkpoint(source, tmp_path / "out", Options())
    agree(tmp_path / "out", forward, 300)
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config.context_length == CONTEXT and loaded.config.end_token_ids == (1, 2)
    assert loaded.tokenizer.adds_begin_token
    # As SentencePiece does: a space before the text, and what has no entry by its bytes.
    assert [loaded.tokenizer.token_bytes(each).decode() for each in loaded.tokenizer.encode("the a")] == [" the", " a"]
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("é!")) == " é!"


@pytest.mark.parametrize("damage", ["cut", "version 2", "vocabulary"])
def test_llama2cs_damaged_or_other_files_are_refused(damage: str, tmp_path: Path) -> None:
    source = llama2c_bin(llama2c(4, tied=True)[0], 4, tmp_path / "model.bin", 1)
    llama2c_vocabulary(tmp_path / "tokenizer.bin")
    if damage == "cut":
        source.write_bytes(source.read_bytes()[:-4])
        match = "its header implies"
    elif damage == "version 2":
        source.write_bytes(source.read_bytes()[:4] + struct.pack("i", 2) + source.read_bytes()[8:])
        match = "version 2"
    else:
        (tmp_path / "tokenizer.bin").write_bytes((tmp_path / "tokenizer.bin").read_bytes()[:-10])
        match = "holds 299 entries"
    with pytest.raises(CheckpointError, match=match):
        import_checkpoint(source, tmp_path / "out", Options())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("groups", "legacy", "changes", "family"),
    [
        (4, False, {}, "llama"),
        (2, False, {"rope_condense_ratio": 2}, "llama"),
        (2, True, {}, "llama"),
        (2, False, {"attn_bias": True}, "qwen2"),
        (2, False, {"norm_qk": True}, "qwen3"),
    ],
)
def test_litgpts_checkpoint(groups: int, legacy: bool, changes: dict[str, Any], family: str, tmp_path: Path) -> None:
    state, settings, forward = litgpt(groups, legacy=legacy, **changes)
    source = tmp_path / "litgpt"
    source.mkdir()
    torch.save({"model": state} if legacy else state, source / "lit_model.pth")
    (source / "model_config.yaml").write_text(yaml.safe_dump(settings))
    import_checkpoint(source, tmp_path / "out", Options(characters="".join(map(chr, range(300, 556)))))
    assert load_checkpoint(tmp_path / "out").config.family == family
    agree(tmp_path / "out", forward, 256)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"parallel_residual": True}, "parallel_residual"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"rotary_percentage": 0.25}, "rotary_percentage"),
        ({"sliding_window_size": 16}, "sliding_window_size"),
        ({"rope_adjustments": {"factor": 2.0}}, "rope_adjustments"),
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name"),
        ({"of_tomorrow": 1}, "of_tomorrow"),
    ],
)
def test_what_of_litgpt_is_not_computed_is_refused_by_name(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    state, settings, _ = litgpt(2, legacy=False)
    torch.save(state, tmp_path / "lit_model.pth")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(settings | changes))
    with pytest.raises(CheckpointError, match=field) as refused:
        import_checkpoint(tmp_path / "lit_model.pth", tmp_path / "out", Options())
    assert refused.value.field == field


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_nanochats_checkpoint(kv_heads: int, tmp_path: Path) -> None:
    vocabulary = len(CHARACTERS)
    state, forward = nanochat(kv_heads, vocabulary, -(-vocabulary // 64) * 64)
    nanochat_file({f"_orig_mod.{name}": each for name, each in state.items()}, tmp_path, kv_heads, vocabulary)
    made = import_checkpoint(tmp_path, tmp_path / "out", Options(characters="".join(CHARACTERS)))
    assert made.kind == "nanochat's GPT"
    agree(tmp_path / "out", forward, vocabulary)
    # It is transformers' NanoChat.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(CONTEXT) % vocabulary
    with torch.no_grad():
        assert torch.allclose(theirs(ids[None]).logits[0], forward(ids), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resid_lambdas", "resid_lambdas"), ("x0_lambdas", "x0_lambdas"), ("value_embeds.1.weight", "value_embeds"),
        ("transformer.h.1.attn.ve_gate.weight", "ve_gate"), ("smear_gate.weight", "smear"),
        ("backout_lambda", "backout"),
    ],
)  # fmt: skip
def test_what_nanochat_has_since_2026_is_refused_by_name(name: str, word: str, tmp_path: Path) -> None:
    state, _ = nanochat(HEADS, 64, 64)
    nanochat_file(state | {name: numbers(2, 8)}, tmp_path, HEADS, 64)
    with pytest.raises(
        CheckpointError, match=rf"nanochat's of 2026, which is not computed here: .* \({word}\)"
    ) as refused:
        import_checkpoint(tmp_path, tmp_path / "out", Options(tokenizer="gpt2"))
    assert "d32" in (refused.value.hint or "")


def test_a_nanochat_without_its_meta_file_or_with_windows_is_told(tmp_path: Path) -> None:
    state, _ = nanochat(HEADS, 64, 64)
    path = nanochat_file(state, tmp_path, HEADS, 64, window_pattern="SSSL")
    for message in ("the windows 'SSSL' are those of nanochat of 2026", "there is no meta_000650.json beside it"):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path, tmp_path / "out", Options(tokenizer="gpt2"))
        (tmp_path / "meta_000650.json").unlink(missing_ok=True)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin(sharded: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    original = tiny_checkpoint("original")
    source = tmp_path / "pickled"
    source.mkdir()
    for file in original.iterdir():
        if file.suffix != ".safetensors" and file.name != "topkapi.json":
            (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(original / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if sharded:
        parts = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(sorted(tensors))}
        for part in set(parts.values()):
            torch.save({name: tensors[name] for name in tensors if parts[name] == part}, source / part)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": parts}))
    else:
        torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(source)
    assert f"topkapi import {source}" in str(refused.value.hint)
    import_checkpoint(source, tmp_path / "out", Options())
    first, second = load_checkpoint(original), load_checkpoint(tmp_path / "out")
    assert first.config == second.config and second.chat is not None
    for name, parameter in first.model.state_dict().items():
        assert torch.equal(parameter, second.model.state_dict()[name]), name


def test_a_repository_of_pickles_is_imported_by_its_name(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = tiny_checkpoint("original")
    torch.save(load_file(original / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with running_hub() as hub:
        connect(monkeypatch, hub, tmp_path / "cache")
        files = hub.add("somebody/old", original).commits["main"]
        del files["model.safetensors"], files["topkapi.json"]
        hub.add("somebody/old", tmp_path / "pytorch_model.bin")
        assert main(["serve", "somebody/old", "--port", "0"]) == 2
        assert not hub.fetched
        assert main(["import", "somebody/old", str(tmp_path / "out")]) == 0
    assert load_checkpoint(tmp_path / "out").config == load_checkpoint(original).config


class Opener:
    """What a hostile pickle has: reading it would call something."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.usefixtures("apart")
def test_a_hostile_pickle_runs_nothing_and_is_told(tmp_path: Path) -> None:
    torch.save({"model": Opener(tmp_path / "harm"), "tok_emb.weight": numbers(2, 2)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="holds more than numbers: it names") as refused:
        import_checkpoint(tmp_path / "evil.pth", tmp_path / "out", Options())
    assert "state_dict()" in str(refused.value.hint) and not (tmp_path / "harm").exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match=r"it names torch\.nn\.modules\.linear\.Linear"):
        import_checkpoint(tmp_path / "whole.pth", tmp_path / "out", Options())


def test_settings_that_hold_one_another_without_end_are_read_to_a_bound(tmp_path: Path) -> None:
    nested: list[Any] = ["x"]
    for _ in range(12):
        nested = [nested] * 900
    state, _ = nanogpt(bias=True)
    torch.save({"config": nested, "model_args": NANO_ARGUMENTS, "model": state}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match="how many heads"):
        import_checkpoint(tmp_path / "ckpt.pt", tmp_path / "out", Options(characters="".join(CHARACTERS)))


@pytest.mark.parametrize("content", ["text", "nothing", "cut", "list", "inflated", "sparse"])
def test_what_is_no_state_of_a_network_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    if content == "inflated":
        # A tensor of a terabyte that is one number, again and again.
        torch.save({"tok_emb.weight": torch.zeros(1).expand(1 << 20, 1 << 18)}, path)
    elif content == "sparse":
        torch.save({"tok_emb.weight": torch.eye(4).to_sparse()}, path)
    elif content == "list":
        torch.save([1, 2], path)
    else:
        torch.save(book(qkv_bias=False)[0], path)
        whole = path.read_bytes()
        path.write_bytes({"text": b"some text", "nothing": b"", "cut": whole[: len(whole) // 2]}[content])
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(path, tmp_path / "out", Options())
    assert str(path) in refused.value.message and not (tmp_path / "out").exists()


def test_variants_that_compute_something_else_are_refused_by_name(tmp_path: Path) -> None:
    state, _ = book(qkv_bias=False)
    path = tmp_path / "model.pth"

    def refusal(state: State) -> str:
        torch.save(state, path)
        with pytest.raises(CheckpointError) as refused:
            import_checkpoint(path, tmp_path / "out", Options(heads=HEADS, characters="".join(CHARACTERS)))
        return refused.value.message

    assert "trf_blocks.0.att.q_norm.scale" in refusal(state | {"trf_blocks.0.att.q_norm.scale": numbers(8)})
    classifier = {"out_head.weight": numbers(2, HIDDEN), "out_head.bias": numbers(2)}
    assert "is a classifier (chapter 6" in refusal(state | classifier)
    assert "lacks pos_emb.weight" in refusal({name: each for name, each in state.items() if name != "pos_emb.weight"})
    assert "has shape" in refusal(state | {"trf_blocks.1.att.W_key.weight": numbers(HIDDEN, HIDDEN // 2)})
    assert "in a layout that is not known" in refusal({"some.weight": numbers(2, 2)})


def test_commands_that_are_given_such_a_file_say_the_import(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(book(qkv_bias=False)[0], tmp_path / "gpt.pth")
    tune = ["finetune", "--data", "x.json", "--checkpoint"]
    for command in (["serve", "--port", "0"], ["generate", "hello", "-c"], tune):
        assert main([*command, str(tmp_path / "gpt.pth")]) == 2
        assert f"topkapi import {tmp_path / 'gpt.pth'} imported/gpt" in capsys.readouterr().err


@pytest.mark.usefixtures("apart")
def test_an_import_is_served(tmp_path: Path, serve: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    state, forward = nanogpt(bias=True)
    source = nanogpt_file(state, tmp_path / "ckpt.pt")
    (tmp_path / "input.txt").write_text(TEXT)
    assert main(["import", str(source), str(tmp_path / "out"), "--data", str(tmp_path / "input.txt")]) == 0
    assert f"serve it with: topkapi serve {tmp_path / 'out'}" in capsys.readouterr().out
    ids = [CHARACTERS.index(character) for character in "To be, or"]
    expected = torch.tensor(ids)
    for _ in range(50):
        expected = torch.cat([expected, forward(expected)[-1].argmax()[None]])
    with serve(tmp_path / "out") as served:
        answer = served.answer("/generate", prompt="To be, or", max_tokens=50, temperature=0)
    assert answer["outputs"][0]["token_ids"] == expected[len(ids) :].tolist()


def test_an_import_is_exported_and_tuned(
    tiny_tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(book(qkv_bias=True, vocabulary=512)[0], tmp_path / "model.pth")
    out, data = tmp_path / "out", tmp_path / "rows.json"
    tiny_tokenizer.save(tmp_path)
    flags = ["--heads", str(HEADS), "--tokenizer", str(tmp_path)]
    assert main(["import", str(tmp_path / "model.pth"), str(out), *flags]) == 0
    assert main(["export", "gguf", str(out), str(tmp_path / "out.gguf"), "--type", "f32"]) == 0
    assert load_checkpoint(tmp_path / "out.gguf").config.family == "gpt2"
    data.write_text(json.dumps([{"instruction": "Greet.", "output": "Hi!"}] * 4))
    flags = ["--max-steps", "1", "--threads", "1", "--batch-size", "2", "--context-length", "64"]
    threads = torch.get_num_threads()
    assert (
        main(["finetune", "--checkpoint", str(out), "--data", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    )
    torch.set_num_threads(threads)
    assert load_checkpoint(tmp_path / "run" / "best").config.vocab_size == 512


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("tok_emb.weight", numbers(8)),
        ("tok_emb.weight", numbers(2, 3, 4)),
        ("tok_emb.weight", torch.tensor(1.0)),
        ("pos_emb.weight", torch.tensor(1.0)),
        ("trf_blocks.0.ff.layers.0.weight", torch.tensor(1.0)),
        (f"trf_blocks.{'1' * 5000}.norm1.scale", numbers(8)),
        ("\x1b[31mred", numbers(8)),
        ("pos_emb.weight", torch.full((16, HIDDEN), 1e300, dtype=torch.float64)),
    ],
    ids=range(8),
)
def test_tensors_of_other_dimensions_are_told_in_words(name: str, damaged: Tensor, tmp_path: Path) -> None:
    torch.save(book(qkv_bias=False)[0] | {name: damaged}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as refused:
        import_checkpoint(tmp_path / "model.pth", tmp_path / "out", Options(heads=2, characters="".join(CHARACTERS)))
    assert refused.value.message.isprintable() and len(refused.value.message) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    "name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"]
)
@pytest.mark.parametrize("damaged", [None, torch.tensor(1.0)], ids=["missing", "a number"])
def test_a_damaged_nanogpt_is_told_in_words(name: str, damaged: Tensor | None, tmp_path: Path) -> None:
    state = nanogpt(bias=True)[0]
    state = {each: value for each, value in state.items() if each != name} | (
        {name: damaged} if damaged is not None else {}
    )
    source = nanogpt_file(state, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError):
        import_checkpoint(source, tmp_path / "out", Options(characters="".join(CHARACTERS)))


def test_a_place_that_cannot_be_made_is_told_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    torch.save(book(qkv_bias=False)[0], tmp_path / "model.pth")
    for out in (tmp_path / "link", "/proc/x/out", "/dev/null/x", tmp_path / ("n" * 300)):
        given = ["import", str(tmp_path / "model.pth"), str(out), "--heads", "2", "--characters", "".join(CHARACTERS)]
        assert main(given) == 2
        assert "Traceback" not in (err := capsys.readouterr().err) and err.startswith("error: "), err


def test_exact_gelu_is_not_exported_as_another_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = nanogpt_file(nanogpt(bias=True)[0], tmp_path / "ckpt.pt")
    import_checkpoint(source, tmp_path / "out", Options(characters="".join(CHARACTERS)))
    assert main(["export", "gguf", str(tmp_path / "out"), str(tmp_path / "out.gguf")]) == 2
    assert "gelu" in capsys.readouterr().err.lower()
