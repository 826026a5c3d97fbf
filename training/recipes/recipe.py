"""Recipes: what a training run is told. Every field is a YAML key and a flag; its description is the help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from topkapi.model.decoding.parameters import from_generation_config, resolve
from topkapi.model.errors import TopkapiError
from topkapi.model.yaml_reading import parse_yaml

# What the kept checkpoints can be chosen by: all that is recorded at evaluations.
Metric = Literal[
    "validation_loss", "train_loss", "smoothed_loss", "copied_from_training", "validation_accuracy", "validation_margin"
]


def setting(default: Any, description: str, *, group: str, free: bool = False, **rules: Any) -> Any:
    """A recipe field. `free` ones may change when a run is resumed: they don't affect what is learned."""
    return Field(default, description=description, json_schema_extra={"group": group, "free": free}, **rules)


in_data = partial(setting, group="data")
in_run = partial(setting, group="run")
in_optimisation = partial(setting, group="optimisation")
in_evaluation = partial(setting, group="evaluation")
in_saving = partial(setting, group="saving")
in_tokenizer = partial(setting, group="tokenizer")
in_model = partial(setting, group="model")
in_adapter = partial(setting, group="adapter")
in_preference = partial(setting, group="preference")


class TrainingRecipe(BaseModel):
    """What pretraining and fine-tuning have in common."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("data", "weights", "generation", "map", mode="before", check_fields=False)
    @classmethod
    def _weighted(cls, value: object) -> object:
        """`{a.txt: 3, b.jsonl: 1}` is `[a.txt=3, b.jsonl=1]`."""
        if not isinstance(value, dict) or any(isinstance(weight, dict | list) for weight in value.values()):
            return value
        return [f"{name}={weight}" for name, weight in value.items()]

    data: list[str] = in_data(
        [], "training files, folders or globs; FILE=3 FILE=1 draws three examples of the first to one"
    )
    data_hint: str | None = in_data(None, "where the data can be had: said when it is missing", free=True)
    validation_data: list[str] = in_data([], "held-out files; none: a part of the data is set aside")
    validation_fraction: float = in_data(0.1, "part of the data set aside for validation", ge=0, lt=1)

    out: str | None = in_run(None, "run directory (default: runs/ and the recipe's name)", free=True)
    overwrite: bool = in_run(False, "delete a run that is already in the run directory", free=True)
    seed: int = in_run(123, "decides initial weights, data order and dropout", ge=0)
    device: str = in_run("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int | None = in_run(None, "CPU threads (default: all cores); sums depend on it", ge=1)
    parallel: Literal["ddp", "fsdp"] | None = in_run(
        None,
        "how the processes of torchrun share the work: ddp, each with the whole network (the default); fsdp, each with "
        "a part of it",
        free=True,
    )
    compile: bool = in_run(False, "compile the network with torch.compile (needs a C++ compiler)")

    batch_size: int = in_optimisation(16, "sequences per update", ge=1)
    micro_batch_size: int | None = in_optimisation(
        None, "sequences computed at once; smaller saves memory (default: the whole batch)", ge=1
    )
    epochs: float = in_optimisation(10, "passes over the training data", gt=0)
    max_steps: int | None = in_optimisation(None, "updates; overrides epochs", ge=1)
    precision: Literal["auto", "fp32", "bf16"] = in_optimisation(
        "fp32",
        "arithmetic of the matrix products; weights and optimiser stay fp32; auto: what is faster on this machine",
    )
    optimizer: Literal["adamw", "muon", "schedule-free"] = in_optimisation(
        "adamw", "muon: Muon for the hidden matrices, AdamW for the rest; schedule-free: AdamW with averaged weights"
    )
    learning_rate: float = in_optimisation(1e-3, "peak learning rate of AdamW", gt=0)
    muon_learning_rate: float | None = in_optimisation(None, "peak learning rate of Muon (default: AdamW's)", gt=0)
    weight_decay: float = in_optimisation(0.1, "decoupled weight decay", ge=0)
    decay: Literal["matrices", "all"] = in_optimisation(
        "matrices", "what is decayed: matrices and embeddings, or all parameters"
    )
    beta1: float = in_optimisation(0.9, "AdamW's decay of the gradient's mean", ge=0, lt=1)
    beta2: float = in_optimisation(0.95, "AdamW's decay of the gradient's square", ge=0, lt=1)
    clip: float | None = in_optimisation(1.0, "largest gradient norm; none: unlimited", gt=0)
    z_loss: float = in_optimisation(
        0.0, "weight of the squared log of the softmax's denominator, which keeps logits small", ge=0
    )
    recompute: bool = in_optimisation(
        False, "compute each layer again for its gradient: less memory, a third more time"
    )
    schedule: Literal["constant", "linear", "cosine", "wsd"] = in_optimisation(
        "cosine", "learning rate over time; wsd: constant, then linear decay at the end"
    )
    decay_fraction: float = in_optimisation(0.4, "part of the run over which wsd's learning rate falls", gt=0, le=1)
    warmup: float = in_optimisation(0.02, "linear warm-up: below 1 a part of the run, else steps", ge=0)
    final_learning_rate: float = in_optimisation(0.1, "what the schedule ends at, as a part of the peak", ge=0, le=1)

    evaluate_every: int | None = in_evaluation(None, "updates between evaluations (default: 20 over the run)", ge=1)
    evaluation_batches: int | None = in_evaluation(
        8, "batches of training and of validation data per evaluation; none: all of validation", ge=1
    )
    track: Literal["trackio", "wandb", "tensorboard"] | None = in_evaluation(
        None, "also send the numbers to this tracker (each is a package of its own)", free=True
    )
    track_project: str | None = in_evaluation(
        None, "the tracker's project (default: the name of the folder around the run directory)", free=True
    )
    track_name: str | None = in_evaluation(
        None, "what the tracker calls the run (default: as its directory; it is known by an id of its own)", free=True
    )
    patience: int | None = in_evaluation(
        None, "stop after so many evaluations without a better validation loss (default: never)", ge=1
    )
    sample_every: Literal["evaluation", "epoch", "never"] = in_evaluation(
        "evaluation", "when samples are generated, stored and, unless every step is evaluated, printed"
    )
    sample_prompts: list[str] = in_evaluation([], "what samples continue")
    sample_tokens: int = in_evaluation(60, "longest sample", ge=1)
    sample_temperature: float = in_evaluation(0.8, "temperature of samples; 0 is greedy", ge=0)

    on_divergence: Literal["stop", "return"] = in_optimisation(
        "stop",
        "a loss that is no number ends the run and one that spikes is named; return: go back to the last regular save "
        "and leave that batch out",
    )

    save_every: int | None = in_saving(
        None,
        "updates between saves for resuming (default: at every evaluation, unless --save-minutes is given)",
        ge=1,
        free=True,
    )
    save_minutes: float | None = in_saving(
        None, "minutes between saves for resuming (default: they are counted in updates)", gt=0, free=True
    )
    asynchronous_saves: bool = in_saving(
        False, "write saves while training goes on; takes memory for a second copy", free=True
    )
    keep: int = in_saving(1, "how many of the latest checkpoints to keep beside the best", ge=1, free=True)
    keep_best: int = in_saving(1, "how many of the best checkpoints to keep", ge=1, free=True)
    best_metric: Metric = in_saving("validation_loss", "which of the recorded numbers says what is best")
    push: str | None = in_saving(
        None, "repository on the Hugging Face hub for the best checkpoint, at the end", free=True
    )
    push_every: int | None = in_saving(
        None,
        "also upload a checkpoint every so many updates, each as a revision of its own, with a card that fills",
        ge=1,
        free=True,
    )
    checkpoint_dtype: Literal["float32", "bfloat16"] = in_saving(
        "float32", "how checkpoints store matrices (a resume always continues in fp32)", free=True
    )
    generation: list[str] = in_saving(
        [],
        "decoding defaults to store with the checkpoint, such as temperature=0.3 top_p=0.9 (default: its parent's, or "
        "temperature 0.8 and top_p 0.95)",
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

    deduplicate: Literal["none", "exact", "near"] = in_data(
        "none", "leave out documents that repeat an earlier one; near: also nearly, 80 % of their runs of 5 words"
    )
    text_field: str = in_data("text", "field of JSON lines or Parquet rows that holds the text")
    split: Literal["auto", "documents", "characters"] = in_data(
        "auto", "validation by whole documents, or the last characters of a single text"
    )
    stride: int | None = in_data(None, "tokens between window starts (default: the context)", ge=1)
    document_mask: bool = in_data(
        False, "no document in a window sees the one before it; pays for many short documents"
    )
    lone_sentences: float = in_data(
        0.0, "so large a part of the sentences comes once more, each as a document of its own", ge=0, le=1
    )
    cache: str = in_data("~/.cache/topkapi", "where token shards are kept", free=True)

    tokenizer: str | None = in_tokenizer(
        None, "gpt2 or a directory with tokenizer.json (default: train one on the data)"
    )
    vocab_size: int | None = in_tokenizer(
        None, "vocabulary of a trained tokenizer (default: 1024 to 8192 by the amount of text)", ge=300
    )
    tokenizer_megabytes: int = in_tokenizer(64, "text a tokenizer is trained on, at most", ge=1)

    model: Literal["tiny", "small", "medium", "gpt2"] = in_model(
        "small", "sizes to start from; the fields below override them"
    )
    family: Literal["gpt2", "llama", "qwen2", "qwen3"] | None = in_model(None, "architecture")
    hidden_size: int | None = in_model(None, "width of the residual stream", ge=1)
    intermediate_size: int | None = in_model(None, "width of the feed-forward layers", ge=1)
    num_layers: int | None = in_model(None, "layers", ge=1)
    num_heads: int | None = in_model(None, "attention heads", ge=1)
    num_kv_heads: int | None = in_model(None, "key-value heads", ge=1)
    head_dim: int | None = in_model(None, "width of a head", ge=2)
    checkpoint: str | None = in_model(None, "checkpoint to go on from (default: random weights)")
    context_length: int | None = in_model(
        None, "tokens in a window (default: 256, or the checkpoint's up to 1024)", ge=2
    )
    dropout: float = in_model(0.0, "dropout while training", ge=0, lt=1)
    qkv_bias: bool | None = in_model(None, "biases on queries, keys and values")
    tie_embeddings: bool = in_model(True, "one matrix for input and output embeddings")
    initialisation: Literal["scaled_normal", "pytorch"] = in_model(
        "scaled_normal", "random weights: GPT-2's, or PyTorch's layer defaults"
    )
    chat_template: str | None = in_model(None, "chat template to store with the checkpoint: chatml, alpaca or a file")


class TuningRecipe(TrainingRecipe):
    """What has a checkpoint to start from."""

    checkpoint: str | None = in_model(None, "checkpoint directory, .gguf file or owner/name on the hub to start from")
    chat_template: str | None = in_model(None, "chatml, alpaca or a file (default: the checkpoint's own, else chatml)")
    dropout: float | None = in_model(None, "dropout while training (default: the checkpoint's)", ge=0, lt=1)
    context_length: int | None = in_model(None, "longest example in tokens (default: the checkpoint's context)", ge=2)

    method: Literal["full", "lora", "qlora", "dora"] = in_adapter(
        "full",
        "what trains: all weights; or adapters beside frozen ones: LoRA, QLoRA (the frozen ones in 4 bits), DoRA",
    )
    lora_rank: int | None = in_adapter(None, "inner size of adapters (default: 16)", ge=1)
    lora_alpha: float | None = in_adapter(None, "adapters are scaled by alpha / rank (default: twice the rank)", gt=0)
    lora_dropout: float | None = in_adapter(None, "dropout on what adapters read (default: 0)", ge=0, lt=1)
    lora_targets: list[str] = in_adapter(
        [], "matrices with adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, … (default: all)"
    )

    split: Literal["random", "file_order"] = in_data(
        "random", "how validation examples are chosen; file_order: the last ones"
    )
    train_examples: int | None = in_data(None, "first so many examples train (file_order)", ge=1)
    test_examples: int = in_data(
        0, "examples after them that are used for nothing here, then validation follows (file_order)", ge=0
    )
    map: list[str] = in_data(
        [],
        "fields that the data call otherwise: Question=prompt Reply=completion; of messages: 'messages[].speaker=role'",
    )
    on_overlong: Literal["error", "drop"] = in_data("error", "what to do with examples longer than the context")
    batch_size: int = in_optimisation(8, "examples per update", ge=1)
    sample_temperature: float = in_evaluation(0.0, "temperature of samples; 0 is greedy", ge=0)

    @field_validator("map")
    @classmethod
    def _meanings(cls, entries: list[str]) -> list[str]:
        from topkapi.training.data.weights import name_and_meaning

        for entry in entries:
            name_and_meaning(entry)
        return entries


class FinetuneRecipe(TuningRecipe):
    """A checkpoint, on instructions and answers or whole conversations."""

    prompt_loss_weight: float = in_data(
        0.0, "weight of the prompt's loss: 0 masks it, 1 trains on it as on the answer", ge=0, le=1
    )
    weights: list[str] = in_data(
        [], "weights of data files that have none of their own, by patterns of their names: 'made*=6'; others have 1"
    )
    epochs: float = in_optimisation(2, "passes over the training data", gt=0)
    learning_rate: float = in_optimisation(1e-4, "peak learning rate of AdamW", gt=0)

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

    beta: float = in_preference(0.1, "how much moving away from the starting checkpoint costs; lower allows more", gt=0)
    label_smoothing: float = in_preference(
        0.0, "probability that a preference is the wrong way round (conservative DPO)", ge=0, lt=0.5
    )

    batch_size: int = in_optimisation(8, "pairs per update", ge=1)
    epochs: float = in_optimisation(1, "passes over the training data", gt=0)
    learning_rate: float = in_optimisation(5e-6, "peak learning rate of AdamW", gt=0)


class KtoRecipe(TuningRecipe):
    """A checkpoint, on answers that are labelled good or bad."""

    beta: float = in_preference(0.1, "how much moving away from the starting checkpoint costs; lower allows more", gt=0)
    desirable_weight: float = in_preference(1.0, "weight of the loss of good answers", gt=0)
    undesirable_weight: float = in_preference(1.0, "weight of the loss of bad answers", gt=0)

    batch_size: int = in_optimisation(8, "answers per update", ge=2)
    epochs: float = in_optimisation(1, "passes over the training data", gt=0)
    learning_rate: float = in_optimisation(5e-6, "peak learning rate of AdamW", gt=0)


def generation_defaults(entries: Sequence[str]) -> dict[str, Any]:
    """`["temperature=0.3", …]` as fields of a `generation_config.json`.

    Raises `ValueError` for what is no field of it that says how to decode, and for values out of range.
    """
    fields: dict[str, Any] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            fields[name] = parse_yaml(value)
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
