"""The fields of a recipe for `kto` as keywords, written by `python -m topkapi.python.declaring`: do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Text = str | PathLike[str]


class KtoFields(TypedDict, total=False):
    """What `topkapi.kto` takes: the fields of its recipe.

    data: training files, folders or globs; FILE=3 FILE=1 draws three examples of the first to one
    data_hint: where the data can be had: said when it is missing
    validation_data: held-out files; none: a part of the data is set aside
    validation_fraction: part of the data set aside for validation [0.1]
    out: run directory (default: runs/ and the recipe's name)
    overwrite: delete a run that is already in the run directory [False]
    seed: decides initial weights, data order and dropout [123]
    device: cpu, cuda, or auto: cuda where there is one ['auto']
    threads: CPU threads (default: all cores); sums depend on it
    parallel: how the processes of torchrun share the work: ddp, each with the whole network (the default);
        fsdp, each with a part of it
    compile: compile the network with torch.compile (needs a C++ compiler) [False]
    batch_size: answers per update [8]
    micro_batch_size: sequences computed at once; smaller saves memory (default: the whole batch)
    epochs: passes over the training data [1]
    max_steps: updates; overrides epochs
    precision: arithmetic of the matrix products; weights and optimiser stay fp32; auto: what is faster on
        this machine ['fp32']
    optimizer: muon: Muon for the hidden matrices, AdamW for the rest; schedule-free: AdamW with averaged
        weights ['adamw']
    learning_rate: peak learning rate of AdamW [5e-06]
    muon_learning_rate: peak learning rate of Muon (default: AdamW's)
    weight_decay: decoupled weight decay [0.1]
    decay: what is decayed: matrices and embeddings, or all parameters ['matrices']
    beta1: AdamW's decay of the gradient's mean [0.9]
    beta2: AdamW's decay of the gradient's square [0.95]
    clip: largest gradient norm; none: unlimited [1.0]
    z_loss: weight of the squared log of the softmax's denominator, which keeps logits small [0.0]
    recompute: compute each layer again for its gradient: less memory, a third more time [False]
    schedule: learning rate over time; wsd: constant, then linear decay at the end ['cosine']
    decay_fraction: part of the run over which wsd's learning rate falls [0.4]
    warmup: linear warm-up: below 1 a part of the run, else steps [0.02]
    final_learning_rate: what the schedule ends at, as a part of the peak [0.1]
    evaluate_every: updates between evaluations (default: 20 over the run)
    evaluation_batches: batches of training and of validation data per evaluation; none: all of validation [8]
    track: also send the numbers to this tracker (each is a package of its own)
    track_project: the tracker's project (default: the name of the folder around the run directory)
    track_name: what the tracker calls the run (default: as its directory; it is known by an id of its own)
    patience: stop after so many evaluations without a better validation loss (default: never)
    sample_every: when samples are generated, stored and, unless every step is evaluated, printed
        ['evaluation']
    sample_prompts: what samples continue
    sample_tokens: longest sample [60]
    sample_temperature: temperature of samples; 0 is greedy [0.0]
    on_divergence: a loss that is no number ends the run and one that spikes is named; return: go back to the
        last regular save and leave that batch out ['stop']
    save_every: updates between saves for resuming (default: at every evaluation, unless --save-minutes is
        given)
    save_minutes: minutes between saves for resuming (default: they are counted in updates)
    asynchronous_saves: write saves while training goes on; takes memory for a second copy [False]
    keep: how many of the latest checkpoints to keep beside the best [1]
    keep_best: how many of the best checkpoints to keep [1]
    best_metric: which of the recorded numbers says what is best ['validation_loss']
    push: repository on the Hugging Face hub for the best checkpoint, at the end
    push_every: also upload a checkpoint every so many updates, each as a revision of its own, with a card
        that fills
    checkpoint_dtype: how checkpoints store matrices (a resume always continues in fp32) ['float32']
    generation: decoding defaults to store with the checkpoint, such as temperature=0.3 top_p=0.9 (default:
        its parent's, or temperature 0.8 and top_p 0.95)
    checkpoint: checkpoint directory, .gguf file or owner/name on the hub to start from
    chat_template: chatml, alpaca or a file (default: the checkpoint's own, else chatml)
    dropout: dropout while training (default: the checkpoint's)
    context_length: longest example in tokens (default: the checkpoint's context)
    method: what trains: all weights; or adapters beside frozen ones: LoRA, QLoRA (the frozen ones in 4 bits),
        DoRA ['full']
    lora_rank: inner size of adapters (default: 16)
    lora_alpha: adapters are scaled by alpha / rank (default: twice the rank)
    lora_dropout: dropout on what adapters read (default: 0)
    lora_targets: matrices with adapters: q_proj, k_proj, v_proj, o_proj, gate_proj, … (default: all)
    split: how validation examples are chosen; file_order: the last ones ['random']
    train_examples: first so many examples train (file_order)
    test_examples: examples after them that are used for nothing here, then validation follows (file_order)
        [0]
    map: fields that the data call otherwise: Question=prompt Reply=completion; of messages:
        'messages[].speaker=role'
    on_overlong: what to do with examples longer than the context ['error']
    beta: how much moving away from the starting checkpoint costs; lower allows more [0.1]
    desirable_weight: weight of the loss of good answers [1.0]
    undesirable_weight: weight of the loss of bad answers [1.0]
    """

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
    precision: Literal["auto", "fp32", "bf16"]
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
    track_project: Text | None
    track_name: Text | None
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
    push_every: int | None
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
    map: Text | Sequence[Text]
    on_overlong: Literal["error", "drop"]
    beta: float
    desirable_weight: float
    undesirable_weight: float
