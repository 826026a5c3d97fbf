"""A Hugging Face directory as OpenVINO's network and tokenizer: `convert_openvino.py DIRECTORY OUT int8|int4|float`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer


def group_size(directory: str) -> int:
    """The longest usual group that every matrix's rows are a multiple of."""
    config = json.loads((Path(directory) / "config.json").read_text())
    hidden = config.get("hidden_size") or config["n_embd"]
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    return next(size for size in (128, 64, 32) if hidden % size == inner % size == 0)


def main() -> None:
    """As `optimum-cli export openvino --weight-format` does."""
    directory, out, kind = sys.argv[1:4]
    how: dict[str, Any] = {"load_in_8bit": kind == "int8"}
    if kind == "int4":
        config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=group_size(directory), ratio=1.0)
        how = {"quantization_config": config}
    OVModelForCausalLM.from_pretrained(directory, export=True, compile=False, **how).save_pretrained(out)
    tokenizer, detokenizer = convert_tokenizer(AutoTokenizer.from_pretrained(directory), with_detokenizer=True)
    openvino.save_model(tokenizer, Path(out) / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, Path(out) / "openvino_detokenizer.xml")


if __name__ == "__main__":
    main()
