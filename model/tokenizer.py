"""Text to token ids and back, for every vocabulary that a `tokenizer.json` can describe.

Byte-level BPE runs on tiktoken where that gives the same ids (see `model.bpe`), everything else on `tokenizers`.
`encode` treats text as text: the spelling of a control token inside it becomes ordinary tokens, so that text can
never forge a turn. Nothing is added to a text, no token for its beginning either.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from model.bpe import BytePairEncoding, byte_pair_encoding
from model.byte_level import components, entry_decoder
from model.errors import CheckpointError, DataError, InvalidRequest
from model.gpt2_vocabulary import END_OF_TEXT, added_token, byte_level_definition, gpt2_definition, parse_merges
from model.pretokenize import QWEN2_PATTERN, split_by, split_gpt2
from model.tokenizer_check import SAMPLE

_LONG_RUN = 16_384
"""tiktoken's regular expressions run out of stack on runs of about a million characters; `tokenizers` does not."""

_NFC = normalizers.NFC()


class Tokenizer:
    """A vocabulary and its encoding.

    `definition` is the content of a `tokenizer.json`; `config` that of a `tokenizer_config.json`, of which the names
    of the begin, end and padding tokens are used and the rest is kept for `save`.
    Raises CheckpointError when the definition cannot be used.
    """

    def __init__(self, definition: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> None:
        self._definition = dict(definition)
        self._config = dict(config or {})
        try:
            self._read_vocabulary()
            working_copy = self._without_control_spellings()
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(working_copy))
            self._fast = self._fast_encoding(working_copy)
        except CheckpointError:
            raise
        except Exception as error:  # tokenizers raises bare Exception; a malformed file anything
            raise CheckpointError(
                f"the tokenizer definition cannot be used: {type(error).__name__}: {error}",
                hint="tokenizer.json must be a file written by the tokenizers library",
            ) from error

    # Reading the definition

    def _read_vocabulary(self) -> None:
        model = self._definition["model"]
        vocabulary = model["vocab"]
        entries = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        decode = entry_decoder(self._definition)
        ids: dict[str, int] = dict(entries)
        added = {entry["content"]: entry for entry in self._definition.get("added_tokens") or []}
        table = {token_id: decode(entry) for entry, token_id in ids.items()}
        for content, entry in added.items():
            ids[content] = int(entry["id"])
            table[ids[content]] = content.encode()
        self.vocab_size: int = max(table) + 1
        self._bytes: list[bytes] = [table.get(token_id, b"") for token_id in range(self.vocab_size)]

        named = {name: _content(self._config.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        self.begin_token_id: int | None = ids.get(named["bos"] or "")
        self.end_token_id: int | None = ids.get(named["eos"] or "")
        self.pad_token_id: int | None = ids.get(named["pad"] or "")
        control = {content for content, entry in added.items() if entry.get("special")}
        control |= {content for content in named.values() if content in ids}
        extra = self._config.get("additional_special_tokens") or self._config.get("extra_special_tokens") or []
        control |= {content for content in map(_content, extra) if content in ids}
        spellings = sorted((content for content in control if content), key=lambda content: ids[content])
        self.control_tokens: Mapping[str, int] = MappingProxyType({content: ids[content] for content in spellings})
        for content, token_id in self.control_tokens.items():
            self._bytes[token_id] = content.encode()
        self._control_ids = frozenset(self.control_tokens.values())
        self._added = added
        self._control_pattern = _control_pattern(spellings, added)
        self._ordinary_added = {
            content: int(entry["id"]) for content, entry in added.items() if content not in self.control_tokens
        }
        self._ordinary_added_pattern = _control_pattern(list(self._ordinary_added), {})

    def _without_control_spellings(self) -> dict[str, Any]:
        """The definition with each control token under a name that no text can contain.

        A Unigram vocabulary would otherwise match a control token's entry inside ordinary text.
        """
        secret = secrets.token_hex(16)
        self._unspoken = {content: f"<{secret}:{token_id}>" for content, token_id in self.control_tokens.items()}
        copy = dict(self._definition)
        copy.update(truncation=None, padding=None, post_processor=None)
        copy["added_tokens"] = [
            {**entry, "content": self._unspoken.get(entry["content"], entry["content"])}
            for entry in self._definition.get("added_tokens") or []
        ]
        listed = {entry["content"] for entry in self._definition.get("added_tokens") or []}
        copy["added_tokens"] += [
            added_token(self._unspoken[content], token_id)
            for content, token_id in self.control_tokens.items()
            if content not in listed
        ]
        model = dict(self._definition["model"])
        if model.get("dropout"):
            model["dropout"] = None
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {self._unspoken.get(entry, entry): token_id for entry, token_id in vocabulary.items()}
        else:
            model["vocab"] = [[self._unspoken.get(entry, entry), score] for entry, score in vocabulary]
        if model.get("unk_token") in self._unspoken:
            model["unk_token"] = self._unspoken[model["unk_token"]]
        if "merges" in model:
            joined = (
                merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]
            )
            model["merges"] = [
                merge for merge, entry in zip(model["merges"], joined, strict=True) if entry not in self._unspoken
            ]
        copy["model"] = model
        return copy

    def _fast_encoding(self, working_copy: Mapping[str, Any]) -> BytePairEncoding | None:
        kinds = [leaf["type"] for leaf in components(self._definition.get("normalizer"))]
        if kinds not in ([], ["NFC"]):
            return None
        self._normalise = kinds == ["NFC"]
        plain = {"single_word": False, "lstrip": False, "rstrip": False}
        for content in self._ordinary_added:
            entry = self._added[content]
            if any(entry.get(key, value) != value for key, value in plain.items()):
                return None
            if self._normalise and entry.get("normalized"):
                return None
        fast = byte_pair_encoding(working_copy, self._backend)
        if fast is None:
            return None
        self._fast = fast
        if self._encode_fast(SAMPLE) != self._backend.encode(SAMPLE, add_special_tokens=False).ids:
            return None
        return fast

    # Encoding

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text. Raises InvalidRequest for a text that is not valid Unicode."""
        _check_unicode(text)
        if self._fast is None or _has_long_run(text):
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        return self._encode_fast(text)

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of `text` in which every control token's spelling becomes that token: for trusted text only."""
        return [token_id for part in self.encode_parts([self.split_control(text)]) for token_id in part]

    def split_control(self, text: str) -> list[str | int]:
        """`text` cut into ordinary text and ids of control tokens, as their spellings stand in it."""
        if self._control_pattern is None:
            return [text] if text else []
        pieces: list[str | int] = []
        position = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > position:
                pieces.append(text[position : match.start()])
            pieces.append(self.control_tokens[match[0] if match[0] in self.control_tokens else match[0].strip()])
            position = match.end()
        if position < len(text):
            pieces.append(text[position:])
        return pieces

    def encode_parts(self, parts: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Ids of consecutive parts of one text, each a list of ordinary text and ids of control tokens.

        No token crosses the border of a part, so the ids of the first parts do not depend on what follows them.
        """
        encoded: list[list[int]] = []
        at_start = True
        for part in parts:
            ids: list[int] = []
            for piece in part:
                ids += [piece] if isinstance(piece, int) else self._encode_piece(piece, at_start)
                at_start = False
            encoded.append(ids)
        return encoded

    def _encode_piece(self, text: str, at_start: bool) -> list[int]:
        if at_start or self._fast is not None or not self._unspoken:
            return self.encode(text)
        # SentencePiece vocabularies treat the start of a text as the start of a word; what follows a token is neither.
        _check_unicode(text)
        before = next(iter(self._unspoken.values()))
        return list(self._backend.encode(before + text, add_special_tokens=False).ids)[1:]

    def _encode_fast(self, text: str) -> list[int]:
        assert self._fast is not None
        if self._ordinary_added_pattern is None:
            return self._encode_segment(text)
        ids: list[int] = []
        position = 0
        for match in self._ordinary_added_pattern.finditer(text):
            ids += self._encode_segment(text[position : match.start()])
            ids.append(self._ordinary_added[match[0]])
            position = match.end()
        return ids + self._encode_segment(text[position:])

    def _encode_segment(self, text: str) -> list[int]:
        assert self._fast is not None
        if self._normalise and not text.isascii():
            text = _NFC.normalize_str(text)
        return self._fast.encode(text)

    # Decoding

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a control token's spelling; nothing for an id beyond the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """The text of `ids`: their bytes in a row, with U+FFFD where those are not valid UTF-8."""
        left_out = self._control_ids if skip_control else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in left_out).decode("utf-8", errors="replace")

    # Storing

    def save(self, directory: str | Path, chat_template: str | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers opens with equal encodings."""
        config = {key: value for key, value in self._config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        if chat_template is not None:
            config["chat_template"] = chat_template
        directory = Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name, content in (("tokenizer.json", self._definition), ("tokenizer_config.json", config)):
                indent = 2 if name == "tokenizer_config.json" else None
                (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"the tokenizer could not be written to {directory}: {error.strerror}") from error

    def with_control_tokens(self, spellings: Iterable[str]) -> "Tokenizer":
        """This vocabulary with further control tokens after its last id; those it already has are kept as they are."""
        new = [spelling for spelling in dict.fromkeys(spellings) if spelling not in self.control_tokens]
        added = [added_token(spelling, self.vocab_size + index) for index, spelling in enumerate(new)]
        definition = {**self._definition, "added_tokens": [*(self._definition.get("added_tokens") or []), *added]}
        return Tokenizer(definition, self._config)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a checkpoint directory: `tokenizer.json`, or GPT-2's older `vocab.json` and `merges.txt`.

        Raises CheckpointError naming the file that is missing or damaged.
        """
        directory = Path(path)
        config_path = directory / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        special_path = directory / "special_tokens_map.json"
        if special_path.is_file():
            config = {**_read_json(special_path), **config}
        if (directory / "tokenizer.json").is_file():
            definition = _read_json(directory / "tokenizer.json")
            if not isinstance(definition.get("model"), dict) or not definition["model"].get("vocab"):
                raise CheckpointError(f"{directory / 'tokenizer.json'} holds no vocabulary")
            return cls(definition, config)
        if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            vocabulary = _read_json(directory / "vocab.json")
            merges = parse_merges((directory / "merges.txt").read_text(encoding="utf-8"))
            end = _content(config.get("eos_token")) or END_OF_TEXT
            added = [added_token(end, vocabulary[end])] if end in vocabulary else []
            config = {"bos_token": end, "eos_token": end, **config} if added else config
            return cls(byte_level_definition(vocabulary, merges, split_gpt2(), added), config)
        raise CheckpointError(
            f"{directory} holds no tokenizer.json",
            hint="save the tokenizer with transformers' AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's vocabulary of 50,257 entries, with <|endoftext|> (50256) to begin, end and pad."""
        return cls(gpt2_definition(), {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")})

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str] = (END_OF_TEXT,)
    ) -> "Tokenizer":
        """A byte-level BPE vocabulary of exactly `vocab_size` entries, control tokens last, trained on `texts`.

        The first control token begins, ends and pads documents. The split is Qwen2's: a word with one leading space or
        sign, every digit on its own (a small vocabulary has no room for three-digit numbers, and digits line up), so
        that checkpoints of the qwen3 family are read by other programs with the split those expect.
        The same texts give the same vocabulary. Raises DataError where they cannot fill it.
        """
        control = list(dict.fromkeys(control_tokens))
        if vocab_size < 256 + len(control):
            raise DataError(
                f"a vocabulary of {vocab_size} entries cannot hold the 256 bytes and {len(control)} control tokens",
                field="vocab_size",
                hint=f"ask for at least {256 + len(control)} entries",
            )
        trained = tokenizers.Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(control),
            min_frequency=2,  # a pair seen once is no pattern
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
        model = json.loads(trained.to_str())["model"]
        size = len(model["vocab"])
        if size + len(control) < vocab_size:
            raise DataError(
                f"the text yields a vocabulary of only {size + len(control)} entries, not {vocab_size}",
                field="vocab_size",
                hint=f"give more text, or ask for at most {size + len(control)} entries",
            )
        added = [added_token(spelling, size + index) for index, spelling in enumerate(control)]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        definition = byte_level_definition(model["vocab"], merges, split_by(QWEN2_PATTERN), added)
        config = {f"{name}_token": control[0] for name in ("bos", "eos", "pad")} if control else {}
        return cls(definition, config)


def _content(token: object) -> str | None:
    """The spelling of a token as `tokenizer_config.json` names it: a string or an object with `content`."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _control_pattern(spellings: Sequence[str], added: Mapping[str, Mapping[str, Any]]) -> re.Pattern[str] | None:
    """A pattern for any of `spellings`, the longest first, with the white space those tokens swallow."""
    if not spellings:
        return None
    alternatives = []
    for spelling in sorted(spellings, key=len, reverse=True):
        entry = added.get(spelling, {})
        before, after = (r"\s*" if entry.get(side) else "" for side in ("lstrip", "rstrip"))
        alternatives.append(before + re.escape(spelling) + after)
    return re.compile("|".join(alternatives))


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the text holds a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}",
            hint="send valid Unicode; a lone surrogate is half of a character, usually cut in two",
        ) from None


def _has_long_run(text: str) -> bool:
    """Whether `text` may hold a run of over 2 * _LONG_RUN characters with or without white space throughout.

    Such a run covers one aligned block, and a block is judged without a scan of its own.
    """
    if len(text) < 2 * _LONG_RUN:
        return False
    blocks = (text[start : start + _LONG_RUN] for start in range(0, len(text), _LONG_RUN))
    return any(block.isspace() or len(block.split(None, 1)) == 1 for block in blocks if len(block) == _LONG_RUN)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content
