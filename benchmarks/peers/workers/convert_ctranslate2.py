"""A Hugging Face directory as CTranslate2's: `convert_ctranslate2.py DIRECTORY OUT int8|float`."""

from __future__ import annotations

import sys

from ctranslate2.converters import TransformersConverter


def main() -> None:
    """As `ct2-transformers-converter` does."""
    directory, out, kind = sys.argv[1:4]
    TransformersConverter(directory, low_cpu_mem_usage=True).convert(
        out, quantization="int8" if kind == "int8" else None
    )


if __name__ == "__main__":
    main()
