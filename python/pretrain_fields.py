"""The fields of a recipe for `pretrain` as keywords, written by `python -m topkapi.python.declaring`: do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, TypedDict

Text = str | PathLike[str]


class PretrainFields(TypedDict, total=False):
    """What `topkapi.pretrain` takes: the fields of its recipe.

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
    batch_size: sequences per update [16]
    micro_batch_size: sequences computed at once; smaller saves memory (default: the whole batch)
    epochs: passes over the training data [10]
    max_steps: updates; overrides epochs
    precision: arithmetic of the matrix products; weights and optimiser stay fp32; auto: what is faster on
        this machine ['fp32']
    optimizer: muon: Muon for the hidden matrices, AdamW for the rest; schedule-free: AdamW with averaged
        weights ['adamw']
    learning_rate: peak learning rate of AdamW [0.001]
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
    sample_temperature: temperature of samples; 0 is greedy [0.8]
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
    deduplicate: leave out documents that repeat an earlier one; near: also nearly, 80 % of their runs of 5
        words ['none']
    text_field: field of JSON lines or Parquet rows that holds the text ['text']
    split: validation by whole documents, or the last characters of a single text ['auto']
    stride: tokens between window starts (default: the context)
    document_mask: no document in a window sees the one before it; pays for many short documents [False]
    lone_sentences: so large a part of the sentences comes once more, each as a document of its own [0.0]
    cache: where token shards are kept ['~/.cache/topkapi']
    tokenizer: gpt2 or a directory with tokenizer.json (default: train one on the data)
    vocab_size: vocabulary of a trained tokenizer (default: 1024 to 8192 by the amount of text)
    tokenizer_megabytes: text a tokenizer is trained on, at most [64]
    model: sizes to start from; the fields below override them ['small']
    family: architecture
    hidden_size: width of the residual stream
    intermediate_size: width of the feed-forward layers
    num_layers: layers
    num_heads: attention heads
    num_kv_heads: key-value heads
    head_dim: width of a head
    checkpoint: checkpoint to go on from (default: random weights)
    context_length: tokens in a window (default: 256, or the checkpoint's up to 1024)
    dropout: dropout while training [0.0]
    qkv_bias: biases on queries, keys and values
    tie_embeddings: one matrix for input and output embeddings [True]
    initialisation: random weights: GPT-2's, or PyTorch's layer defaults ['scaled_normal']
    chat_template: chat template to store with the checkpoint: chatml, alpaca or a file
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
