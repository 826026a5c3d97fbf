"""The fields of recipes as keywords, written by `python -m topkapi.python.declaring`: do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Text = str | PathLike[str]


class PretrainFields(TypedDict, total=False):
    """What `pretrain` takes: the fields of its recipe."""

    data: Text | Sequence[Text] | Mapping[str, float]
    data_hint: Text | None
    validation_data: Text | Sequence[Text]
    validation_fraction: float
    out: Text | None
    overwrite: bool
    seed: int
    device: Text
    threads: int | None
    parallel: Literal["ddp", "fsdp"] | None
    compile: bool
    batch_size: int
    micro_batch_size: int | None
    epochs: float
    max_steps: int | None
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "muon", "schedule-free"]
    learning_rate: float
    muon_learning_rate: float | None
    weight_decay: float
    decay: Literal["matrices", "all"]
    beta1: float
    beta2: float
    clip: float | None
    z_loss: float
    recompute: bool
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    decay_fraction: float
    warmup: float
    final_learning_rate: float
    evaluate_every: int | None
    evaluation_batches: int | None
    track: Literal["trackio", "wandb", "tensorboard"] | None
    patience: int | None
    sample_every: Literal["evaluation", "epoch", "never"]
    sample_prompts: Text | Sequence[Text]
    sample_tokens: int
    sample_temperature: float
    on_divergence: Literal["stop", "return"]
    save_every: int | None
    save_minutes: float | None
    asynchronous_saves: bool
    keep: int
    keep_best: int
    best_metric: Literal[
        "validation_loss",
        "train_loss",
        "smoothed_loss",
        "copied_from_training",
        "validation_accuracy",
        "validation_margin",
    ]
    push: Text | None
    checkpoint_dtype: Literal["float32", "bfloat16"]
    generation: Text | Sequence[Text] | Mapping[str, float]
    deduplicate: Literal["none", "exact", "near"]
    text_field: Text
    split: Literal["auto", "documents", "characters"]
    stride: int | None
    document_mask: bool
    lone_sentences: float
    cache: Text
    tokenizer: Text | None
    vocab_size: int | None
    tokenizer_megabytes: int
    model: Literal["tiny", "small", "medium", "gpt2"]
    family: Literal["gpt2", "llama", "qwen2", "qwen3"] | None
    hidden_size: int | None
    intermediate_size: int | None
    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    checkpoint: Text | None
    context_length: int | None
    dropout: float
    qkv_bias: bool | None
    tie_embeddings: bool
    initialisation: Literal["scaled_normal", "pytorch"]
    chat_template: Text | None


class FinetuneFields(TypedDict, total=False):
    """What `finetune` takes: the fields of its recipe."""

    data: Text | Sequence[Text] | Mapping[str, float]
    data_hint: Text | None
    validation_data: Text | Sequence[Text]
    validation_fraction: float
    out: Text | None
    overwrite: bool
    seed: int
    device: Text
    threads: int | None
    parallel: Literal["ddp", "fsdp"] | None
    compile: bool
    batch_size: int
    micro_batch_size: int | None
    epochs: float
    max_steps: int | None
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "muon", "schedule-free"]
    learning_rate: float
    muon_learning_rate: float | None
    weight_decay: float
    decay: Literal["matrices", "all"]
    beta1: float
    beta2: float
    clip: float | None
    z_loss: float
    recompute: bool
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    decay_fraction: float
    warmup: float
    final_learning_rate: float
    evaluate_every: int | None
    evaluation_batches: int | None
    track: Literal["trackio", "wandb", "tensorboard"] | None
    patience: int | None
    sample_every: Literal["evaluation", "epoch", "never"]
    sample_prompts: Text | Sequence[Text]
    sample_tokens: int
    sample_temperature: float
    on_divergence: Literal["stop", "return"]
    save_every: int | None
    save_minutes: float | None
    asynchronous_saves: bool
    keep: int
    keep_best: int
    best_metric: Literal[
        "validation_loss",
        "train_loss",
        "smoothed_loss",
        "copied_from_training",
        "validation_accuracy",
        "validation_margin",
    ]
    push: Text | None
    checkpoint_dtype: Literal["float32", "bfloat16"]
    generation: Text | Sequence[Text] | Mapping[str, float]
    checkpoint: Text | None
    chat_template: Text | None
    dropout: float | None
    context_length: int | None
    method: Literal["full", "lora", "qlora", "dora"]
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    lora_targets: Text | Sequence[Text]
    split: Literal["random", "file_order"]
    train_examples: int | None
    test_examples: int
    on_overlong: Literal["error", "drop"]
    prompt_loss_weight: float
    weights: Text | Sequence[Text] | Mapping[str, float]


class DpoFields(TypedDict, total=False):
    """What `dpo` takes: the fields of its recipe."""

    data: Text | Sequence[Text] | Mapping[str, float]
    data_hint: Text | None
    validation_data: Text | Sequence[Text]
    validation_fraction: float
    out: Text | None
    overwrite: bool
    seed: int
    device: Text
    threads: int | None
    parallel: Literal["ddp", "fsdp"] | None
    compile: bool
    batch_size: int
    micro_batch_size: int | None
    epochs: float
    max_steps: int | None
    precision: Literal["fp32", "bf16"]
    optimizer: Literal["adamw", "muon", "schedule-free"]
    learning_rate: float
    muon_learning_rate: float | None
    weight_decay: float
    decay: Literal["matrices", "all"]
    beta1: float
    beta2: float
    clip: float | None
    z_loss: float
    recompute: bool
    schedule: Literal["constant", "linear", "cosine", "wsd"]
    decay_fraction: float
    warmup: float
    final_learning_rate: float
    evaluate_every: int | None
    evaluation_batches: int | None
    track: Literal["trackio", "wandb", "tensorboard"] | None
    patience: int | None
    sample_every: Literal["evaluation", "epoch", "never"]
    sample_prompts: Text | Sequence[Text]
    sample_tokens: int
    sample_temperature: float
    on_divergence: Literal["stop", "return"]
    save_every: int | None
    save_minutes: float | None
    asynchronous_saves: bool
    keep: int
    keep_best: int
    best_metric: Literal[
        "validation_loss",
        "train_loss",
        "smoothed_loss",
        "copied_from_training",
        "validation_accuracy",
        "validation_margin",
    ]
    push: Text | None
    checkpoint_dtype: Literal["float32", "bfloat16"]
    generation: Text | Sequence[Text] | Mapping[str, float]
    checkpoint: Text | None
    chat_template: Text | None
    dropout: float | None
    context_length: int | None
    method: Literal["full", "lora", "qlora", "dora"]
    lora_rank: int | None
    lora_alpha: float | None
    lora_dropout: float | None
    lora_targets: Text | Sequence[Text]
    split: Literal["random", "file_order"]
    train_examples: int | None
    test_examples: int
    on_overlong: Literal["error", "drop"]
    beta: float
    label_smoothing: float
