"""Recipes: what a training run is told. Every field is a YAML key and a flag; its description is the help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from topkapi.model.decoding.parameters import from_generation_config, resolve
from topkapi.model.errors import TopkapiError

# What the kept checkpoints can be chosen by: all that is recorded at evaluations.
Metric = Literal[
    "validation_loss", "train_loss", "smoothed_loss", "copied_from_training", "validation_accuracy", "validation_margin"
]


def setting(default: Any, description: str, *, group: str, free: bool = False, **rules: Any) -> Any:
    """A recipe field. `free` ones may change when a run is resumed: they don't affect what is learned."""
    return Field(default, description=description, json_schema_extra={"group": group, "free": free}, **rules)


class TrainingRecipe(BaseModel):
    """What pretraining and fine-tuning have in common."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("data", "weights", "generation", mode="before", check_fields=False)
    @classmethod
    def _weighted(cls, value: object) -> object:
        """`{a.txt: 3, b.jsonl: 1}` is `[a.txt=3, b.jsonl=1]`."""
        return [f"{name}={weight}" for name, weight in value.items()] if isinstance(value, dict) else value

    data: list[str] = setting(
        [], "training files, folders or globs; FILE=3 FILE=1 draws three examples of the first to one", group="data"
    )
    data_hint: str | None = setting(None, "where the data can be had: said when it is missing", group="data", free=True)
    validation_data: list[str] = setting([], "held-out files; none: a part of the data is set aside", group="data")
    validation_fraction: float = setting(0.1, "part of the data set aside for validation", group="data", ge=0, lt=1)

    out: str | None = setting(None, "run directory (default: runs/ and the recipe's name)", group="run", free=True)
    overwrite: bool = setting(False, "delete a run that is already in the run directory", group="run", free=True)
    seed: int = setting(123, "decides initial weights, data order and dropout", group="run", ge=0)
    device: str = setting("auto", "cpu, cuda, or auto: cuda where there is one", group="run")
    threads: int | None = setting(None, "CPU threads (default: all cores); sums depend on it", group="run", ge=1)
    parallel: Literal["ddp", "fsdp"] | None = setting(
        None,
        "how the processes of torchrun share the work: ddp, each with the whole network (the default); fsdp, each with "
        "a part of it",
        group="run",
        free=True,
    )
    compile: bool = setting(False, "compile the network with torch.compile (needs a C++ compiler)", group="run")

    batch_size: int = setting(16, "sequences per update", group="optimisation", ge=1)
    micro_batch_size: int | None = setting(
        None, "sequences computed at once; smaller saves memory (default: the whole batch)", group="optimisation", ge=1
    )
    epochs: float = setting(10, "passes over the training data", group="optimisation", gt=0)
    max_steps: int | None = setting(None, "updates; overrides epochs", group="optimisation", ge=1)
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", "arithmetic of the matrix products; weights and optimiser stay fp32", group="optimisation"
    )
    optimizer: Literal["adamw", "muon", "schedule-free"] = setting(
        "adamw",
        "muon: Muon for the hidden matrices, AdamW for the rest; schedule-free: AdamW with averaged weights",
        group="optimisation",
    )
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", group="optimisation", gt=0)
    muon_learning_rate: float | None = setting(
        None, "peak learning rate of Muon (default: AdamW's)", group="optimisation", gt=0
    )
    weight_decay: float = setting(0.1, "decoupled weight decay", group="optimisation", ge=0)
    decay: Literal["matrices", "all"] = setting(
        "matrices", "what is decayed: matrices and embeddings, or all parameters", group="optimisation"
    )
    beta1: float = setting(0.9, "AdamW's decay of the gradient's mean", group="optimisation", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the gradient's square", group="optimisation", ge=0, lt=1)
    clip: float | None = setting(1.0, "largest gradient norm; none: unlimited", group="optimisation", gt=0)
    z_loss: float = setting(
        0.0,
        "weight of the squared log of the softmax's denominator, which keeps logits small",
        group="optimisation",
        ge=0,
    )
    recompute: bool = setting(
        False, "compute each layer again for its gradient: less memory, a third more time", group="optimisation"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = setting(
        "cosine", "learning rate over time; wsd: constant, then linear decay at the end", group="optimisation"
    )
    decay_fraction: float = setting(
        0.4, "part of the run over which wsd's learning rate falls", group="optimisation", gt=0, le=1
    )
    warmup: float = setting(0.02, "linear warm-up: below 1 a part of the run, else steps", group="optimisation", ge=0)
    final_learning_rate: float = setting(
        0.1, "what the schedule ends at, as a part of the peak", group="optimisation", ge=0, le=1
    )

    evaluate_every: int | None = setting(
        None, "updates between evaluations (default: 20 over the run)", group="evaluation", ge=1
    )
    evaluation_batches: int | None = setting(
        8,
        "batches of training and of validation data per evaluation; none: all of validation",
        group="evaluation",
        ge=1,
    )
    track: Literal["trackio", "wandb", "tensorboard"] | None = setting(
        None, "also send the numbers to this tracker (each is a package of its own)", group="evaluation", free=True
    )
    patience: int | None = setting(
        None,
        "stop after so many evaluations without a better validation loss (default: never)",
        group="evaluation",
        ge=1,
    )
    sample_every: Literal["evaluation", "epoch", "never"] = setting(
        "evaluation",
        "when samples are generated, stored and, unless every step is evaluated, printed",
        group="evaluation",
    )
    sample_prompts: list[str] = setting([], "what samples continue", group="evaluation")
    sample_tokens: int = setting(60, "longest sample", group="evaluation", ge=1)
    sample_temperature: float = setting(0.8, "temperature of samples; 0 is greedy", group="evaluation", ge=0)

    on_divergence: Literal["stop", "return"] = setting(
        "stop",
        "a loss that is no number ends the run and one that spikes is named; return: go back to the last regular save "
        "and leave that batch out",
        group="optimisation",
    )

    save_every: int | None = setting(
        None,
        "updates between saves for resuming (default: at every evaluation, unless --save-minutes is given)",
        group="saving",
        ge=1,
        free=True,
    )
    save_minutes: float | None = setting(
        None,
        "minutes between saves for resuming (default: they are counted in updates)",
        group="saving",
        gt=0,
        free=True,
    )
    asynchronous_saves: bool = setting(
        False, "write saves while training goes on; takes memory for a second copy", group="saving", free=True
    )
    keep: int = setting(
        1, "how many of the latest checkpoints to keep beside the best", group="saving", ge=1, free=True
    )
    keep_best: int = setting(1, "how many of the best checkpoints to keep", group="saving", ge=1, free=True)
    best_metric: Metric = setting("validation_loss", "which of the recorded numbers says what is best", group="saving")
    push: str | None = setting(
        None, "repository on the Hugging Face hub for the best checkpoint, at the end", group="saving", free=True
    )
    checkpoint_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "how checkpoints store matrices (a resume always continues in fp32)", group="saving", free=True
    )
    generation: list[str] = setting(
        [],
        "decoding defaults to store with the checkpoint, such as temperature=0.3 top_p=0.9 (default: its parent's, or "
        "temperature 0.8 and top_p 0.95)",
        group="saving",
        free=True,
    )

    @field_validator("generation")
    @classmethod
    def _known(cls, generation: list[str]) -> list[str]:
        generation_defaults(generation)
        return generation

    def is_open_ended(self) -> bool:
        """Whether no step depends on how many there are in all."""
        return self.schedule == "constant" and not 0 < self.warmup < 1

    def generation_config(self, inherited: Mapping[str, Any], end_token_ids: Sequence[int]) -> dict[str, Any]:
        """What the checkpoint's `generation_config.json` holds."""
        return {**inherited, **generation_defaults(self.generation), "eos_token_id": list(end_token_ids)}


class PretrainRecipe(TrainingRecipe):
    """A network from random weights, on plain text."""

    deduplicate: Literal["none", "exact", "near"] = setting(
        "none",
        "leave out documents that repeat an earlier one; near: also nearly, 80 % of their runs of 5 words",
        group="data",
    )
    text_field: str = setting("text", "field of JSON lines or Parquet rows that holds the text", group="data")
    split: Literal["auto", "documents", "characters"] = setting(
        "auto", "validation by whole documents, or the last characters of a single text", group="data"
    )
    stride: int | None = setting(None, "tokens between window starts (default: the context)", group="data", ge=1)
    document_mask: bool = setting(
        False, "no document in a window sees the one before it; pays for many short documents", group="data"
    )
    lone_sentences: float = setting(
        0.0, "so large a part of the sentences comes once more, each as a document of its own", group="data", ge=0, le=1
    )
    cache: str = setting("~/.cache/topkapi", "where token shards are kept", group="data", free=True)

    tokenizer: str | None = setting(
        None, "gpt2 or a directory with tokenizer.json (default: train one on the data)", group="tokenizer"
    )
    vocab_size: int | None = setting(
        None,
        "vocabulary of a trained tokenizer (default: 1024 to 8192 by the amount of text)",
        group="tokenizer",
        ge=300,
    )
    tokenizer_megabytes: int = setting(64, "text a tokenizer is trained on, at most", group="tokenizer", ge=1)

    model: Literal["tiny", "small", "medium", "gpt2"] = setting(
        "small", "sizes to start from; the fields below override them", group="model"
    )
    family: Literal["gpt2", "llama", "qwen2", "qwen3"] | None = setting(None, "architecture", group="model")
    hidden_size: int | None = setting(None, "width of the residual stream", group="model", ge=1)
    intermediate_size: int | None = setting(None, "width of the feed-forward layers", group="model", ge=1)
    num_layers: int | None = setting(None, "layers", group="model", ge=1)
    num_heads: int | None = setting(None, "attention heads", group="model", ge=1)
    num_kv_heads: int | None = setting(None, "key-value heads", group="model", ge=1)
    head_dim: int | None = setting(None, "width of a head", group="model", ge=2)
    checkpoint: str | None = setting(None, "checkpoint to go on from (default: random weights)", group="model")
    context_length: int | None = setting(
        None, "tokens in a window (default: 256, or the checkpoint's up to 1024)", group="model", ge=2
    )
    dropout: float = setting(0.0, "dropout while training", group="model", ge=0, lt=1)
    qkv_bias: bool | None = setting(None, "biases on queries, keys and values", group="model")
    tie_embeddings: bool = setting(True, "one matrix for input and output embeddings", group="model")
    initialisation: Literal["scaled_normal", "pytorch"] = setting(
        "scaled_normal", "random weights: GPT-2's, or PyTorch's layer defaults", group="model"
    )
    chat_template: str | None = setting(
        None, "chat template to store with the checkpoint: chatml, alpaca or a file", group="model"
    )


class TuningRecipe(TrainingRecipe):
    """What has a checkpoint to start from."""

    checkpoint: str | None = setting(None, "checkpoint directory or .gguf file to start from", group="model")
    chat_template: str | None = setting(
        None, "chatml, alpaca or a file (default: the checkpoint's own, else chatml)", group="model"
    )
    dropout: float | None = setting(
        None, "dropout while training (default: the checkpoint's)", group="model", ge=0, lt=1
    )
    context_length: int | None = setting(
        None, "longest example in tokens (default: the checkpoint's context)", group="model", ge=2
    )

    method: Literal["full", "lora", "qlora", "dora"] = setting(
        "full",
        "what trains: all weights; or adapters beside frozen ones: LoRA, QLoRA (the frozen ones in 4 bits), DoRA",
        group="adapter",
    )
    lora_rank: int | None = setting(None, "inner size of adapters (default: 16)", group="adapter", ge=1)
    lora_alpha: float | None = setting(
        None, "adapters are scaled by alpha / rank (default: twice the rank)", group="adapter", gt=0
    )
    lora_dropout: float | None = setting(
        None, "dropout on what adapters read (default: 0)", group="adapter", ge=0, lt=1
    )
    lora_targets: list[str] = setting(
        [], "matrices with adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, … (default: all)", group="adapter"
    )

    split: Literal["random", "file_order"] = setting(
        "random", "how validation examples are chosen; file_order: the last ones", group="data"
    )
    train_examples: int | None = setting(None, "first so many examples train (file_order)", group="data", ge=1)
    test_examples: int = setting(
        0,
        "examples after them that are used for nothing here, then validation follows (file_order)",
        group="data",
        ge=0,
    )
    on_overlong: Literal["error", "drop"] = setting(
        "error", "what to do with examples longer than the context", group="data"
    )
    batch_size: int = setting(8, "examples per update", group="optimisation", ge=1)
    sample_temperature: float = setting(0.0, "temperature of samples; 0 is greedy", group="evaluation", ge=0)


class FinetuneRecipe(TuningRecipe):
    """A checkpoint, on instructions and answers or whole conversations."""

    prompt_loss_weight: float = setting(
        0.0, "weight of the prompt's loss: 0 masks it, 1 trains on it as on the answer", group="data", ge=0, le=1
    )
    weights: list[str] = setting(
        [],
        "weights of data files that have none of their own, by patterns of their names: 'made*=6'; others have 1",
        group="data",
    )
    epochs: float = setting(2, "passes over the training data", group="optimisation", gt=0)
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW", group="optimisation", gt=0)

    @field_validator("weights")
    @classmethod
    def _patterns(cls, weights: list[str]) -> list[str]:
        from topkapi.training.data.weights import pattern_and_weight

        for entry in weights:
            pattern_and_weight(entry)
        return weights

    @model_validator(mode="after")
    def _weigh(self) -> FinetuneRecipe:
        if self.weights and len(self.data) > 1:
            from topkapi.training.data.weights import weighted

            self.data = weighted(self.data, self.weights)
        return self


class DpoRecipe(TuningRecipe):
    """A checkpoint, on pairs of a preferred and a rejected answer."""

    beta: float = setting(
        0.1, "how much moving away from the starting checkpoint costs; lower allows more", group="preference", gt=0
    )
    label_smoothing: float = setting(
        0.0, "probability that a preference is the wrong way round (conservative DPO)", group="preference", ge=0, lt=0.5
    )

    batch_size: int = setting(8, "pairs per update", group="optimisation", ge=1)
    epochs: float = setting(1, "passes over the training data", group="optimisation", gt=0)
    learning_rate: float = setting(5e-6, "peak learning rate of AdamW", group="optimisation", gt=0)


def generation_defaults(entries: Sequence[str]) -> dict[str, Any]:
    """`["temperature=0.3", …]` as fields of a `generation_config.json`.

    Raises `ValueError` for what is no field of it that says how to decode, and for values out of range.
    """
    fields: dict[str, Any] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            fields[name] = None
        found = from_generation_config({name: fields[name]})
        if not found:
            raise ValueError(f"{entry!r} is not a decoding default and its value, as in temperature=0.3")
        try:
            resolve(found)
        except TopkapiError as error:
            raise ValueError(f"{entry}: {error}") from None
    return fields


def free_fields(kind: type[TrainingRecipe]) -> set[str]:
    """Fields that may differ when a run is resumed."""
    return {
        name
        for name, field in kind.model_fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra["free"]
    }


def deciding_fields(recipe: TrainingRecipe) -> dict[str, Any]:
    """What decides the weights, for a checkpoint's `topkapi.json`; data and parent stand there by their digests."""
    elsewhere = {"data", "validation_data", "checkpoint"}
    return recipe.model_dump(mode="json", exclude=free_fields(type(recipe)) | elsewhere)
