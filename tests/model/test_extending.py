"""The example of docs/extending.md: a family of networks as a row of the table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from tests.extending import execute
from topkapi.model.config import ModelConfig
from topkapi.model.errors import CheckpointError
from topkapi.model.families import FAMILIES
from topkapi.model.storage.tensors import from_hugging_face, to_hugging_face
from topkapi.model.transformer import Decoder

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def test_a_new_family_computes_what_transformers_computes(tmp_path: Path) -> None:
    parsed = transformers.AutoConfig.for_model("seed_oss", **SIZES)
    with pytest.raises(CheckpointError, match="seed_oss"):
        ModelConfig.from_hugging_face(parsed.to_dict())
    execute("A family", tmp_path)
    try:
        theirs = transformers.AutoModelForCausalLM.from_config(parsed).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
        config = ModelConfig.from_hugging_face(parsed.to_dict())
        model = Decoder(config)
        model.load_state_dict(dict(from_hugging_face(config, iter(theirs.state_dict().items()))))
        tokens = torch.randint(0, 60, (2, 40))
        with torch.no_grad():
            expected, found = theirs(tokens).logits, model(tokens, torch.arange(40).expand(2, -1))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert ModelConfig.from_hugging_face(config.to_hugging_face()) == config
        assert set(to_hugging_face(config, model.state_dict())) == set(theirs.state_dict())
    finally:
        del FAMILIES["seed_oss"]
