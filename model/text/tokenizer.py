"""Text to token ids and back, for every vocabulary that a `tokenizer.json` can describe.

Byte-level BPE runs on tiktoken where that gives the same ids (see `model.text.encoding`), everything else on
`tokenizers`. `encode` treats text as text: the spelling of a control token inside it becomes ordinary tokens, so that
text can never forge a turn. Nothing is added to a text, no token for its beginning either; `adds_begin_token` says
whether the checkpoint's own tools put one there.
"""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import normalizers

from topkapi.model.errors import CheckpointError
from topkapi.model.interruption import between_pieces
from topkapi.model.reading import is_confined
from topkapi.model.text.added_tokens import (
    added_token,
    any_of,
    are_plain,
    further_special_tokens,
    named_tokens,
    token_content,
    typed,
)
from topkapi.model.text.byte_level import components, entry_decoder
from topkapi.model.text.encoding import (
    BytePairEncoding,
    backend_ids,
    byte_pair_encoding,
    check_unicode,
    cut,
    has_long_run,
    keeps_borders,
    merge_pairs,
    next_border,
    panics_refused,
)
from topkapi.model.text.gpt2_vocabulary import gpt2_definition
from topkapi.model.text.tokenizer_check import SAMPLE, WORDS
from topkapi.model.text.tokenizer_definition import (
    END_OF_TEXT,
    adds_begin_token,
    adds_end_token,
    read_definition,
    renamed_definition,
    trained_definition,
    without_prefix,
    write_definition,
)
from topkapi.model.text.trial import try_tokenizer

_MOST_ENTRIES = 1 << 24
"""No vocabulary has so many; an id beyond is a damaged file, which must not ask for a table of that size."""

_PIECE = 65_536
"""Characters that are encoded at once: a few milliseconds of work, between which others get the interpreter."""

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
        if is_confined():
            try_tokenizer(self._definition, self._config)
        try:
            self._read_vocabulary()
            working_copy = renamed_definition(self._definition, self._unspoken)
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(working_copy))
            self._check_ids()
            self._fast = self._fast_encoding(working_copy)
        except (CheckpointError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises bare Exception and panics; a malformed file anything
            raise CheckpointError(
                f"the tokenizer definition cannot be used: {type(error).__name__}: {error}",
                hint="tokenizer.json must be a file written by the tokenizers library",
            ) from error

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
        if not table or min(table) < 0 or max(table) >= _MOST_ENTRIES:
            raise CheckpointError(f"the tokenizer's ids must lie between 0 and {_MOST_ENTRIES - 1}")
        self.vocab_size: int = max(table) + 1
        self._bytes: list[bytes] = [table.get(token_id, b"") for token_id in range(self.vocab_size)]

        self.special_tokens: Mapping[str, str] = MappingProxyType(named_tokens(self._config))
        """The special tokens that have names, by these, as chat templates know them: `eos_token`, `unk_token`, …"""
        named = {name: self.special_tokens.get(f"{name}_token") for name in ("bos", "eos", "pad")}
        special_ids = {name: ids[content] for name, content in named.items() if content and content in ids}
        self.begin_token_id: int | None = special_ids.get("bos")
        self.end_token_id: int | None = special_ids.get("eos")
        self.pad_token_id: int | None = special_ids.get("pad")
        self.adds_begin_token = adds_begin_token(self._definition, self._config, named["bos"], self.begin_token_id)
        self.adds_end_token = adds_end_token(self._definition, self._config, named["eos"], self.end_token_id)
        """Whether the checkpoint's own tools put the end token behind a text; to a text that goes on, none is put."""
        control = {content for content, entry in added.items() if entry.get("special")}
        control |= {content for content in self.special_tokens.values() if content in ids}
        control |= {content for content in map(token_content, further_special_tokens(self._config)) if content in ids}
        spellings = sorted((content for content in control if content), key=lambda content: ids[content])
        self.control_tokens: Mapping[str, int] = MappingProxyType({content: ids[content] for content in spellings})
        for content, token_id in self.control_tokens.items():
            self._bytes[token_id] = content.encode()
        self._control_ids = frozenset(self.control_tokens.values())
        secret = secrets.token_hex(16)
        # What merges are built on has to keep its name: it is an ordinary entry first, which any text may hold.
        inside = [content for content in spellings if content in vocabulary] if "merges" in model else []
        parts = {part for pair in merge_pairs(model) for part in pair} if inside else set()
        self._unspoken: dict[str, str | None] = {
            content: None if content in parts else f"<{secret}:{token_id}>"
            for content, token_id in self.control_tokens.items()
        }
        self._added = added
        self._ordinary_added = {
            content: int(entry["id"]) for content, entry in added.items() if content not in self.control_tokens
        }
        self._ordinary_added_pattern = any_of(self._ordinary_added)
        self._plain_pattern = any_of([*spellings, *self._ordinary_added])

    def _check_ids(self) -> None:
        for content, entry in self._added.items():
            place = self._backend.token_to_id(self._unspoken.get(content) or content)
            if place != int(entry["id"]):
                raise CheckpointError(
                    f"tokenizer.json gives the added token {content!r} the id {entry['id']}, "
                    f"but its place in the vocabulary is {place}",
                    hint="save the tokenizer anew with the tokenizers library",
                )

    def _fast_encoding(self, working_copy: Mapping[str, Any]) -> BytePairEncoding | None:
        kinds = [leaf["type"] for leaf in components(self._definition.get("normalizer"))]
        if kinds not in ([], ["NFC"]):
            return None
        self._normalise = kinds == ["NFC"]
        if not are_plain([self._added[content] for content in self._ordinary_added], self._normalise):
            return None
        fast = byte_pair_encoding(working_copy)
        if fast is None:
            return None
        self._fast = fast
        if self._encode_fast(SAMPLE) != self._backend.encode(SAMPLE, add_special_tokens=False).ids:
            return None
        return fast

    @property
    def uses_tiktoken(self) -> bool:
        """Whether ordinary text is encoded by tiktoken rather than by `tokenizers`."""
        return self._fast is not None

    @property
    def definition(self) -> Mapping[str, Any]:
        """The content of its `tokenizer.json`."""
        return self._definition

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as ordinary text. Raises InvalidRequest for a text that is not valid Unicode."""
        check_unicode(text)
        with panics_refused():
            return self._encode_whole(text) if len(text) <= _PIECE else self._encode_in_pieces(text, self._backend)

    @cached_property
    def longest_token(self) -> int:
        """The bytes of the token that has most: no text of more than n times as many is n tokens."""
        return max(map(len, self._bytes))

    def _encode_whole(self, text: str) -> list[int]:
        if self._fast is None or has_long_run(text):
            return backend_ids(self._backend, text)
        return self._encode_fast(text)

    def _encode_in_pieces(self, text: str, beginning: tokenizers.Tokenizer) -> list[int]:
        """The ids of a long text, cut only where that can't change them; a text without such a place stays whole."""
        ids: list[int] = []
        backend = beginning
        for piece in self.pieces(text):
            between_pieces()
            ids += self._encode_whole(piece) if self._fast is not None else backend_ids(backend, piece)
            backend = self._continuing
        return ids

    def pieces(self, text: str) -> Iterator[str]:
        """`text` as it is encoded piece by piece; one is long where there is no place for a cut."""
        return cut(text, _PIECE) if len(text) > _PIECE and self._can_be_cut else iter([text] if text else [])

    @cached_property
    def _can_be_cut(self) -> bool:
        """Whether a text's pieces between two borders have the ids that they have within it.

        So it is where no entry has a border inside, for then nothing is merged across one, and where what splits and
        normalises a text looks no further than the next word. The latter is tried out.
        """
        steps = {leaf["type"] for leaf in components(self._definition.get("normalizer"))}
        swallowing = any(entry.get("rstrip") for entry in self._added.values())
        if swallowing or not keeps_borders(steps, self._bytes):
            return False
        text = f"{SAMPLE}\n{WORDS}"
        whole = self._encode_whole(text)
        border = 0
        while (border := next_border(text, border + 1) or 0) > 0:
            before, after = text[:border], text[border:]
            rest = self._encode_whole(after) if self._fast is not None else backend_ids(self._continuing, after)
            if self._encode_whole(before) + rest != whole:
                return False
        return True

    def encode_with_control(self, text: str) -> list[int]:
        """Ids of `text` in which every control token's spelling becomes that token: for trusted text only."""
        if self._added_are_plain:
            return [token_id for part in self.encode_parts([self.split_control(text)]) for token_id in part]
        check_unicode(text)
        return list(self._trusting.encode(text, add_special_tokens=False).ids)

    def split_control(self, text: str) -> list[str | int]:
        """`text` cut into ordinary text and ids of control tokens, as their spellings stand in it.

        A spelling counts where the vocabulary's own rules match it: not inside another added token's, for one.
        """
        pieces: list[str | int] = []
        position = 0
        for start, stop, spelling in self._matches(text):
            if spelling in self.control_tokens:
                if start > position:
                    pieces.append(text[position:start])
                pieces.append(self.control_tokens[spelling])
                position = stop
        if position < len(text):
            pieces.append(text[position:])
        return pieces

    def _matches(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where added tokens and control tokens stand in `text`, with the white space they swallow, in order."""
        if self._plain_pattern is None:
            return
        if self._added_are_plain:
            yield from ((match.start(), match.end(), match[0]) for match in self._plain_pattern.finditer(text))
            return
        check_unicode(text)
        matcher, spellings = self._matcher
        encoding = matcher.encode(text, add_special_tokens=False)
        for index, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if index:
                yield start, stop, spellings[index - 1]

    @cached_property
    def _added_are_plain(self) -> bool:
        unlisted = [added_token(spelling, 0) for spelling in self.control_tokens if spelling not in self._added]
        return are_plain([*self._added.values(), *unlisted], self._definition.get("normalizer") is not None)

    @cached_property
    def _trusting(self) -> tokenizers.Tokenizer:
        """The vocabulary as `tokenizers` runs it on text whose control tokens count."""
        same = {spelling: spelling for spelling in self.control_tokens}
        return tokenizers.Tokenizer.from_str(json.dumps(renamed_definition(self._definition, same)))

    @cached_property
    def _matcher(self) -> tuple[tokenizers.Tokenizer, list[str]]:
        """`tokenizers` with the added tokens and nothing else: it finds them, from the id 1 on, and texts as id 0."""
        listed = renamed_definition(self._definition, {spelling: spelling for spelling in self.control_tokens})
        added = [{**entry, "id": index} for index, entry in enumerate(listed["added_tokens"], start=1)]
        unknown = secrets.token_hex(16)
        model = {"type": "WordLevel", "vocab": {unknown: 0}, "unk_token": unknown}
        definition = {**listed, "added_tokens": added, "pre_tokenizer": None, "decoder": None, "model": model}
        return tokenizers.Tokenizer.from_str(json.dumps(definition)), [entry["content"] for entry in added]

    def encode_parts(self, parts: Sequence[Sequence[str | int]]) -> list[list[int]]:
        """Ids of consecutive parts of one text, each a list of ordinary text and ids of control tokens.

        No token crosses the border of a part, so the ids of the first parts do not depend on what follows them.
        """
        encoded: list[list[int]] = []
        before: str | int | None = None
        for part in parts:
            ids: list[int] = []
            for piece in part:
                ids += [piece] if isinstance(piece, int) else self._encode_after(before, piece)
                before = piece
            encoded.append(ids)
        return encoded

    def _encode_after(self, before: str | int | None, text: str) -> list[int]:
        """Ids of ordinary `text` after a control token, after other text, or (None) at the start.

        Only SentencePiece vocabularies make a difference: they put a space before a text, some also after a control
        token, but never in the middle of a text.
        """
        if before is None or self._fast is not None:
            return self.encode(text)
        check_unicode(text)
        with panics_refused():
            if isinstance(before, str):
                return self._encode_in_pieces(text, self._continuing)
            names = (name for spelling, name in self._unspoken.items() if self.control_tokens[spelling] == before)
            ids = self._encode_in_pieces((next(names) or "") + text, self._backend)
            return ids[ids.index(before) + 1 :] if before in ids else ids

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """The vocabulary as `tokenizers` runs it in the middle of a text, where no space is put before."""
        return tokenizers.Tokenizer.from_str(
            json.dumps(without_prefix(renamed_definition(self._definition, self._unspoken)))
        )

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

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a control token's spelling; nothing for an id beyond the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """The text of `ids`: their bytes in a row, with U+FFFD where those are not valid UTF-8."""
        left_out = self._control_ids if skip_control else frozenset()
        return b"".join(self.token_bytes(i) for i in ids if i not in left_out).decode("utf-8", errors="replace")

    def save(self, directory: str | Path, chat_template: str | list[dict[str, str]] | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers opens with equal encodings.

        `chat_template` is one as text, or several with names: see `ChatTemplate.stored`.
        """
        config = {key: typed(value) for key, value in self._config.items() if key != "chat_template"}
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("clean_up_tokenization_spaces", False)
        if chat_template is not None:
            config["chat_template"] = chat_template
        write_definition(Path(directory), self._definition, config)

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
        definition, config = read_definition(Path(path))
        return cls(definition, config)

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's vocabulary of 50,257 entries, with <|endoftext|> (50256) to begin, end and pad."""
        return cls(gpt2_definition(), {f"{name}_token": END_OF_TEXT for name in ("bos", "eos", "pad")})

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, control_tokens: Sequence[str] = (END_OF_TEXT,)
    ) -> "Tokenizer":
        """A byte-level BPE vocabulary of exactly `vocab_size` entries, control tokens last, trained on `texts`.

        The first control token begins, ends and pads documents. The split is Qwen2's, one leading space or sign at a
        word and every digit on its own: digits then line up, a small vocabulary spends nothing on numbers, and other
        programs know the split by name. On books and Wikipedia it makes 1.7 % more tokens than groups of digits do.
        The same texts give the same vocabulary. Raises DataError where they cannot fill it.
        """
        control = list(dict.fromkeys(control_tokens))
        definition = trained_definition(texts, vocab_size, control)
        config = {f"{name}_token": control[0] for name in ("bos", "eos", "pad")} if control else {}
        return cls(definition, config)
