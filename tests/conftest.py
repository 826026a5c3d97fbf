"""Shared fixtures: tiny checkpoints with random weights, and folders of data where the machine has some."""

import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.chat import BUILT_IN_TEMPLATES, ChatTemplate
from model.checkpoint import save_checkpoint
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Decoder, initialise

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def english() -> str:
    """About half a megabyte of English text that every Python carries."""
    return "\n\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))


@pytest.fixture(scope="session")
def tiny_tokenizer(english: str) -> Tokenizer:
    """A byte-level BPE vocabulary of 512 entries with ChatML's control tokens."""
    return Tokenizer.train([english[:50_000]], 512, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Callable[..., Path]:
    """Makes a checkpoint directory with random weights: `tiny_checkpoint(name, chat=True, seed=0, context=128)`."""

    def make(name: str = "tiny", *, chat: bool = True, seed: int = 0, context: int = 128) -> Path:
        config = ModelConfig(
            family="qwen3",
            vocab_size=tiny_tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            context_length=context,
            end_token_ids=(tiny_tokenizer.control_tokens["<|endoftext|>"],),
        )
        model = Decoder(config)
        initialise(model, torch.Generator().manual_seed(seed))
        template = ChatTemplate(BUILT_IN_TEMPLATES["chatml"], "chatml") if chat else None
        directory = tmp_path_factory.mktemp("checkpoints") / name
        details = {"note": "random weights"}
        return save_checkpoint(
            directory, model=model, tokenizer=tiny_tokenizer, chat=template, generation={}, details=details
        )

    return make


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """Where larger texts and weights lie, for the longer checks; skips where they don't."""
    directory = Path(os.environ.get("TOPKAPI_DATA", ROOT / ".." / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip("needs the data folder: set TOPKAPI_DATA")
    return directory
