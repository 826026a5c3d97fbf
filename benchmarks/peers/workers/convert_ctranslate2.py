"""A Hugging Face directory as CTranslate2's: `convert_ctranslate2.py DIRECTORY OUT int8|float`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ctranslate2.converters import TransformersConverter


def main() -> None:
    """As `ct2-transformers-converter` does."""
    directory, out, kind = sys.argv[1:4]
    quantization = "int8" if kind == "int8" else None
    TransformersConverter(directory, low_cpu_mem_usage=True).convert(out, quantization=quantization)
    # A tokenizer without one of these leaves it null or empty, which the generator refuses to read.
    file = Path(out) / "config.json"
    config, last = json.loads(file.read_text()), json.loads((Path(out) / "vocabulary.json").read_text())[-1]
    config |= {name: last for name in ("bos_token", "eos_token", "unk_token") if not config[name]}
    file.write_text(json.dumps(config))


if __name__ == "__main__":
    main()
