"""Adapters that stand beside a checkpoint that is served, unmerged: read, and held to what that takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from topkapi.model.config import ModelConfig
from topkapi.model.conversation.chat_template import ChatTemplate
from topkapi.model.decoding.parameters import check_generation_config
from topkapi.model.errors import CheckpointError
from topkapi.model.reading import check_memory, check_place, confined, read_json
from topkapi.model.storage.adapters import CONFIG_FILE, AdapterFiles, read_adapter, read_settings
from topkapi.model.storage.checkpoint import Checkpoint, end_tokens, telling
from topkapi.model.storage.generation_config import check_defaults
from topkapi.model.storage.location import check_location, unreadable
from topkapi.model.storage.verification import read_details, verify_digests
from topkapi.model.text.tokenizer import Tokenizer

WHOLE = "serve its directory as a checkpoint of its own, which merges it into its base"


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter to stand beside its base: `matrices` as `model.live_adapter` takes them, and what else it changes.

    `base` is what it calls its base, `digest` that of the base's weights, where it says so; `chat` and `generation` are
    its own, None where it has none.
    """

    path: Path
    base: str | None
    digest: str | None
    rank: int
    matrices: dict[str, tuple[Tensor, Tensor]]
    chat: ChatTemplate | None
    generation: dict[str, Any] | None


def load_adapter(path: str | Path, base: Checkpoint, *, within: str | Path | None = None) -> StoredAdapter:
    """Read an adapter in PEFT's format that is to stand beside `base`, without merging it.

    Raises `CheckpointError` as `load_checkpoint` does, and for one that does more than LoRA of the layers' matrices
    does, that has another vocabulary, or whose answers end otherwise.
    """
    path = Path(path)
    with telling(path), confined(None if within is None else Path(within)):
        check_place(path)
        if not path.exists():
            raise CheckpointError(f"there is no adapter at {path}", hint="give a directory that holds " + CONFIG_FILE)
        check_location(path, path)
        check_memory(path, sum(file.stat().st_size for file in path.glob("*.safetensors")))
        details = read_details(path)
        verify_digests(path, details)
        if details.get("base_held_in") == "nf4":
            raise CheckpointError(
                f"the adapter {path} was trained on its base in nf4, which this is not",
                hint=WHOLE,
            )
        # Shapes are those of the checkpoint; a served one may have a shorter context.
        found = read_adapter(path, base.config)
        matrices = _matrices(found, base.config)
        _check_vocabulary(path, base)
        chat = ChatTemplate.from_directory(path)
        generation = read_json(path / "generation_config.json") or None
        if generation is not None:
            check_defaults(generation, base.tokenizer, path)
            check_generation_config(generation, base.config.vocab_size, str(path / "generation_config.json"))
        ends = end_tokens(base.config, base.tokenizer, chat, generation or {})
        if not set(ends) <= set(base.config.end_token_ids):
            raise CheckpointError(
                f"the adapter {path} ends answers with other tokens than {base.name} does",
                hint=WHOLE,
            )
    rank = max(len(down) for down, _ in matrices.values())
    digest = (details.get("parent") or {}).get("sha256")
    return StoredAdapter(path, found.base, digest, rank, matrices, chat, generation)


def _check_vocabulary(path: Path, base: Checkpoint) -> None:
    if not (path / "tokenizer.json").is_file():
        return
    own = Tokenizer.from_directory(path)
    if not same_vocabulary(own, base.tokenizer):
        raise CheckpointError(
            f"the adapter {path} has another vocabulary than {base.name}",
            hint=WHOLE,
        )


def same_vocabulary(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether every token is the same in both, control tokens too."""
    if (first.vocab_size, first.control_tokens) != (second.vocab_size, second.control_tokens):
        return False
    return all(first.token_bytes(token_id) == second.token_bytes(token_id) for token_id in range(first.vocab_size))


def base_named(path: Path) -> str | None:
    """What the adapter in `path` calls its base. Raises `CheckpointError` for what is no adapter that can be read."""
    try:
        check_place(path)
        if not (path / CONFIG_FILE).is_file():
            raise CheckpointError(f"there is no adapter at {path}", hint=f"give a directory that holds {CONFIG_FILE}")
        named = read_settings(path).get("base_model_name_or_path")
    except OSError as error:
        raise unreadable(path, error) from error
    return named or None


def _matrices(found: AdapterFiles, config: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """What `model.live_adapter` puts beside the matrices of a network of the shape `config`: by module, `down` and `up`
    with the scale in it, float32.

    Raises `CheckpointError` for an adapter that does more than that, does not fit, or holds what is no number.
    """
    embedded = [name for name in (*found.rows, *found.replaced, *found.matrices) if not name.startswith("layers.")]
    if found.rows or found.replaced or embedded:
        named = next(iter([*found.rows, *found.replaced, *embedded])).removesuffix(".weight")
        raise CheckpointError(f"the adapter {found.path} has weights of its own for {named}", hint=WHOLE)
    shapes, matrices = _shapes(config), {}
    for name, change in found.matrices.items():
        module = name.removesuffix(".weight")
        if change.magnitude is not None:
            raise CheckpointError(f"the adapter {found.path} is DoRA, not LoRA alone", hint=WHOLE)
        shape = (change.up.shape[0], change.down.shape[1])
        if (expected := shapes.get(module)) != shape:
            has = "does not have it" if expected is None else f"has one of {expected[0]} x {expected[1]}"
            raise CheckpointError(
                f"the adapter {found.path} is for a {module} of {shape[0]} x {shape[1]}, and the base {has}",
                hint="name the base that it was trained on",
            )
        down, up = change.down.float(), change.up.float() * change.scale
        if not (down.isfinite().all() and up.isfinite().all()):
            raise CheckpointError(
                f"the adapter {found.path} holds what is no number in {module}", hint="its training went wrong, or "
                "the file is damaged: copy it again",
            )  # fmt: skip
        matrices[module] = down, up
    if not matrices:
        raise CheckpointError(f"the adapter {found.path} changes nothing", hint="copy the adapter again")
    return matrices


def _shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of all layers, by module."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    of_layer = {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    if config.gated_mlp:
        of_layer["mlp.gate_proj"] = (inner, hidden)
    return {f"layers.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in of_layer.items()}
