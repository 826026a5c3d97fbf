"""Networks of known shapes with random weights, for measuring where no checkpoint is at hand."""

from __future__ import annotations

from pathlib import Path

import torch

from topkapi.model.config import ModelConfig
from topkapi.model.quantize import quantize
from topkapi.model.storage.checkpoint import Checkpoint
from topkapi.model.text.added_tokens import added_token
from topkapi.model.text.byte_level import BYTE_TO_CHARACTER
from topkapi.model.text.pretokenize import split_gpt2
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.text.tokenizer_definition import END_OF_TEXT, byte_level_definition
from topkapi.model.transformer import Decoder, initialise

VOCABULARY = 50_257
GPT2 = ModelConfig(
    family="gpt2", vocab_size=VOCABULARY, hidden_size=768, intermediate_size=3072, num_layers=12, num_heads=12,
    num_kv_heads=12, head_dim=64, context_length=1024, norm_eps=1e-5, qkv_bias=True, output_bias=True,
    mlp_bias=True, end_token_ids=(VOCABULARY - 1,),
)  # fmt: skip
"""GPT-2 small: 124M parameters in 12 layers (Radford et al. 2019)."""

SMOLLM2 = ModelConfig(
    family="llama", vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, context_length=8192, norm_eps=1e-5, rope_theta=100_000.0, end_token_ids=(49_151,),
)  # fmt: skip
"""SmolLM2's smallest: 135M parameters in 30 thin layers, so that what a layer costs beside its products shows."""

# Random logits spread this much have about the entropy of GPT-2's on text, 3.5 nats: cutting a flat distribution costs
# more than cutting any that a trained network makes.
LOGIT_DEVIATION = 4.5


def random_checkpoint(dtype: torch.dtype | None = None, config: ModelConfig = GPT2) -> Checkpoint:
    """A network with random weights and a vocabulary of byte pairs.

    Matrices are held in `dtype` (None: bfloat16), as `load_checkpoint` would.
    """
    model = Decoder(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        # A normalised state has length sqrt(hidden_size), an entry of the embedding deviation 0.02.
        assert model.norm.weight is not None, "GPT-2's norms have weights"
        model.norm.weight.fill_(LOGIT_DEVIATION / (0.02 * config.hidden_size**0.5))
        for parameter in model.parameters():
            if parameter.ndim == 2 and dtype != torch.float32:
                parameter.data = parameter.data.bfloat16()
    model.eval().requires_grad_(False)
    if dtype == torch.int8:
        quantize(model)
    return Checkpoint("random", Path(), config, model, _byte_pairs(config.vocab_size))


def _byte_pairs(size: int) -> Tokenizer:
    """A vocabulary of `size` entries: every byte, pairs of bytes and the end of a text."""
    letters = list(BYTE_TO_CHARACTER.values())
    pairs = [(first, second) for first in letters for second in letters][: size - len(letters) - 1]
    entries = [*letters, *(first + second for first, second in pairs), END_OF_TEXT]
    vocabulary = {entry: token_id for token_id, entry in enumerate(entries)}
    merges = [f"{first} {second}" for first, second in pairs]
    end = added_token(END_OF_TEXT, size - 1)
    return Tokenizer(byte_level_definition(vocabulary, merges, split_gpt2(), [end]))
