"""The same weights for everybody: a Hugging Face directory in float32, and what each peer makes of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .engines import CORES, HERE, PeerError, environment

SHAPES = ("gpt2", "smollm2")

LLAMA_CPP_TYPES = {"int8": "Q8_0", "int4": "Q4_0", "float": "F16"}


def source(cache: Path, shape: str, weights: Path | None) -> Path:
    """The directory that all others are made from: of random weights, or of those at `weights`, a directory or a GGUF
    file, whose blocks are read out as float32."""
    import torch

    from topkapi.model.storage.checkpoint import load_checkpoint, save_checkpoint
    from topkapi.service.commands.bench_model import GPT2, SMOLLM2, random_checkpoint

    if weights is not None and weights.is_dir():
        return weights
    directory = cache / "weights" / (weights.stem if weights else shape)
    if not (directory / "config.json").exists():
        said(f"weights: {directory}")
        if weights:
            made = load_checkpoint(weights, dtype=torch.float32)
        else:
            made = random_checkpoint(torch.float32, {"gpt2": GPT2, "smollm2": SMOLLM2}[shape])
        directory.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(directory, model=made.model, tokenizer=made.tokenizer, chat=None, generation={}, details={})
    return directory


def gguf(cache: Path, directory: Path, kind: str, build: Path) -> Path:
    """The GGUF file of a class of precisions, made by the `llama-quantize` of `build`."""
    file = cache / "weights" / f"{directory.name}.{LLAMA_CPP_TYPES[kind]}.gguf"
    if not file.exists():
        whole = cache / "weights" / f"{directory.name}.F32.gguf"
        if not whole.exists():
            main = "import sys; from topkapi.service.commands.cli import main; sys.exit(main())"
            command(sys.executable, "-c", main, "export", "gguf", "--type", "f32", str(directory), str(whole))
        quantize = build / "bin" / "llama-quantize"
        command(str(quantize), str(whole), f"{file}.part", LLAMA_CPP_TYPES[kind], str(CORES))
        Path(f"{file}.part").rename(file)
    return file


def converted(cache: Path, directory: Path, peer: str, kind: str, python: Path) -> Path:
    """What `workers/convert_PEER.py` makes of `directory`, in the environment of `python`."""
    out = cache / "weights" / f"{directory.name}.{peer}.{kind}"
    if not out.exists():
        script = HERE / "workers" / f"convert_{peer}.py"
        command(str(python), str(script), str(directory), f"{out}.part", kind)
        Path(f"{out}.part").rename(out)
    return out


def int8_bytes(directory: Path) -> int:
    """Bytes that a token's pass reads at least where each weight takes one: every matrix once, of the embedding only
    where it is the output's too."""
    import json

    from safetensors import safe_open

    tied = bool(json.loads((directory / "config.json").read_text()).get("tie_word_embeddings", True))
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                shape = tensors.get_slice(name).get_shape()
                looked_up = "wpe" in name or (not tied and ("wte" in name or "embed_tokens" in name))
                repeated = tied and "lm_head" in name
                if len(shape) == 2 and not looked_up and not repeated:
                    total += shape[0] * shape[1]
    return total


def command(*words: str) -> None:
    """Run a command to its end. Raises `PeerError` with the end of what it said."""
    said(" ".join(words[:6]))
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise PeerError(f"{' '.join(words)}\n{(done.stdout + done.stderr)[-2000:]}")


def said(line: str) -> None:
    """How far it is, on standard error."""
    print(line, file=sys.stderr, flush=True)
