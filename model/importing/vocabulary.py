"""The vocabulary of an imported network: by its name, from a directory, or the characters of a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from topkapi.model.errors import CheckpointError
from topkapi.model.hub.files import has_tokenizer
from topkapi.model.importing.llama2c import read_tokenizer
from topkapi.model.importing.options import Network, Options
from topkapi.model.text.tokenizer import Tokenizer
from topkapi.model.user_files import expanded

_GPT2_SIZES = (50_257, 50_304)
"""GPT-2's vocabulary, and nanoGPT's rounding of it to a multiple of 64."""

_PIECE = 1 << 20


def vocabulary(network: Network, options: Options) -> tuple[Tokenizer, str]:
    """The tokenizer of a network, and where it is from in words.

    Raises `CheckpointError` where it has to be said, or where what was said does not fit.
    """
    size = int(network.config["vocab_size"])
    given = [name for name in ("tokenizer", "data", "characters") if getattr(options, name)]
    if len(given) > 1:
        raise CheckpointError(f"{given[0]} and {given[1]} exclude each other", field=given[1], hint="leave one out")
    if options.tokenizer is not None:
        return _named(options.tokenizer, size), options.tokenizer
    if options.data:
        texts = ", ".join(map(str, options.data))
        characters = sorted(_characters_in(options.data))
        return _of_characters(characters, size, f"the text in {texts}"), f"the {size} characters of {texts}"
    if options.characters is not None:
        return _of_characters(list(options.characters), size, "--characters"), f"the {size} characters given"
    if network.folder is not None:
        names = {path.name for path in network.folder.iterdir()}
        if has_tokenizer(names):
            return _checked(Tokenizer.from_directory(network.folder), size, str(network.folder)), str(network.folder)
        if "tokenizer.bin" in names:
            place = network.folder / "tokenizer.bin"
            return read_tokenizer(place, size), str(place)
    if size in _GPT2_SIZES:
        return Tokenizer.gpt2(), f"GPT-2's, by its {size:,} entries"
    raise _unknown(network, size)


def _unknown(network: Network, size: int) -> CheckpointError:
    about = "" if network.dataset is None else f"; it was trained on the dataset {network.dataset!r}"
    if size > 5000:
        return CheckpointError(
            f"which vocabulary its {size:,} entries are cannot be told{about}",
            field="tokenizer",
            hint="say it: --tokenizer DIRECTORY (with tokenizer.json), --tokenizer tokenizer.bin (llama2.c's) or "
            "--tokenizer gpt2",
        )
    dataset = network.dataset or "NAME"
    return CheckpointError(
        f"its vocabulary has {size} entries, which may be characters{about}; meta.pkl, which would say, is a pickle "
        "and is never read",
        field="data",
        hint=f"give the text it was trained on, from which the characters are read: --data data/{dataset}/input.txt; "
        "or --characters with them in their order, or --tokenizer DIRECTORY",
    )


def _named(name: str, size: int) -> Tokenizer:
    path = expanded(name)
    if name == "gpt2" and not path.exists():
        return _checked(Tokenizer.gpt2(), size, "gpt2")
    if path.is_dir():
        return _checked(Tokenizer.from_directory(path), size, name)
    if path.suffix == ".bin" and path.is_file():
        return read_tokenizer(path, size)
    if path.name == "tokenizer.json" and path.is_file():
        return _checked(Tokenizer.from_directory(path.parent), size, name)
    if path.suffix in (".pkl", ".model"):
        raise CheckpointError(
            f"{name} is never read: {'a pickle may run code' if path.suffix == '.pkl' else 'only SentencePiece does'}",
            field="tokenizer",
            hint="give a directory with tokenizer.json, or llama2.c's tokenizer.bin; characters come from --data TEXT",
        )
    raise CheckpointError(
        f"there is no tokenizer at {name}",
        field="tokenizer",
        hint="give gpt2, a directory with tokenizer.json or llama2.c's tokenizer.bin",
    )


def _checked(tokenizer: Tokenizer, size: int, name: str) -> Tokenizer:
    if tokenizer.vocab_size > size:
        raise CheckpointError(
            f"the vocabulary {name} has {tokenizer.vocab_size:,} entries and the network only {size:,}",
            field="tokenizer",
            hint="give the one that the network was trained with",
        )
    return tokenizer


def _characters_in(paths: Iterable[Path]) -> set[str]:
    """Every character of the texts, read as Python reads text files: all kinds of line ends are one."""
    found: set[str] = set()
    for path in paths:
        try:
            with expanded(path).open(encoding="utf-8") as file:
                while piece := file.read(_PIECE):
                    found.update(piece)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8 text: {error}", field="data") from None
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read: {error.strerror}", field="data", hint="give the text it was trained on"
            ) from None
    return found


def _of_characters(characters: list[str], size: int, origin: str) -> Tokenizer:
    if len(characters) != size or len(set(characters)) != size:
        different = len(set(characters))
        again = f", {len(characters) - different} of them twice" if different < len(characters) else ""
        raise CheckpointError(
            f"{origin} has {len(characters)} characters{again}, and the network {size} entries",
            field="data" if "--characters" not in origin else "characters",
            hint="give the very text that it was trained on, or all its characters in their order",
        )
    return Tokenizer(character_definition(characters))


def character_definition(characters: list[str]) -> dict[str, Any]:
    """A `tokenizer.json` in which each character is a token, and any other one is refused rather than passed over."""
    if "\u2581" in characters:
        raise CheckpointError("the character U+2581 cannot be told from a space in tokenizer.json", field="characters")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # The library wants a name for what is unknown, and refuses a text where no entry has it.
        "model": {
            "type": "WordLevel",
            "vocab": {character: index for index, character in enumerate(characters)},
            "unk_token": "<unknown>",
        },
    }  # fmt: skip
