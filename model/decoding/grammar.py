"""Structured output: which tokens may come next so that the answer keeps to a schema, a pattern or a grammar.

llguidance (Moskal et al., Microsoft) parses: an Earley parser over a lexer of regular-expression derivatives, walked
along a trie of the vocabulary's bytes. What it allows is a mask over token ids, the first of the decoding stages, so
every sampler works on what is left. With 50,257 tokens and JSON schemas a mask takes 0.07 to 0.2 ms in the median and
0.8 ms at worst (inside a string of bounded length), a copy 3 us, compiling a few ms, and the vocabulary's trie 0.4 s
once (one core of a busy server).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import llguidance
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from topkapi.model.decoding.grammar_source import SYNTAX_HINTS, check_lark, reason_of, refused, source_of
from topkapi.model.decoding.parameters import DecodingParameters, grammar_parameter
from topkapi.model.decoding.table import LONGEST_STRUCTURE
from topkapi.model.errors import EngineError, InvalidRequest, Overloaded
from topkapi.model.text.tokenizer import Tokenizer

# Grammars come from strangers. llguidance recurses along chains of definitions, and an ordinary thread's stack
# overflows at about 2,000 of them, which would end the process; intersections can take exponential time.
LONGEST_TEXT = LONGEST_STRUCTURE
LONGEST_CHOICES = 1_048_576
"""Characters of all choices together; they are compiled in a time that grows with them alone."""
STACK_BYTES = 128 * 1024 * 1024
COMPILE_SECONDS = 10.0
MOST_COMPILING = 4
WAIT_SECONDS = 1.0
"""Most compile in milliseconds, so a place among those that may compile at once is soon free, or not for long."""

_STACK_SIZE = threading.Lock()
_COMPILING = threading.BoundedSemaphore(MOST_COMPILING)
Mask = NDArray[np.bool_]


class Constraint:
    """What one answer may go on with. It sees every chosen token once, in order; errors are raised by `advance`."""

    def __init__(self, matcher: llguidance.LLMatcher, grammar: _Grammar) -> None:
        self._matcher, self._grammar = matcher, grammar
        self._mask, self._finished = grammar.ends_only, False
        self._look()

    @property
    def finished(self) -> bool:
        """Whether the answer is complete and nothing but an end token could follow."""
        return self._finished

    def mask(self) -> Tensor:
        """Which tokens may come next, bool `[vocab_size]` on the CPU, not to be written to.

        End tokens are among them exactly where the answer may stop; ids beyond the tokenizer's vocabulary never are.
        """
        return torch.from_numpy(self._mask)

    def advance(self, token_id: int) -> None:
        """Go on by a token that `mask` allows.

        Raises `EngineError` for any other, and `InvalidRequest` where the grammar turns out to have no continuation
        in this vocabulary or takes too much work to follow.
        """
        if not self._mask[token_id]:
            raise EngineError(f"token id {token_id} was chosen, but the grammar does not allow it")
        if token_id in self._grammar.end_token_ids:
            self._mask = self._grammar.ends_only
            self._finished = True
            return
        self._matcher.consume_token(token_id)
        self._look()

    def copy(self) -> Constraint:
        """The same place in the grammar, to go on from independently."""
        other = copy(self)
        other._matcher = self._matcher.deep_copy()
        return other

    def _look(self) -> None:
        matcher, grammar = self._matcher, self._grammar
        # One bit per token and one for the end of the grammar, in 32-bit words.
        words = np.zeros(grammar.token_count // 32 + 1, dtype=np.uint32)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        mask = np.zeros(grammar.vocab_size, dtype=np.bool_)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=grammar.token_count)
        mask[: grammar.token_count] = bits.view(np.bool_)
        mask &= grammar.not_ends
        may_go_on, may_stop = bool(mask.any()), matcher.is_accepting()
        if not may_go_on and not may_stop:
            reason = (
                reason_of(matcher.get_error()) if matcher.is_error() else "nothing can follow what is written so far"
            )
            raise grammar.error(reason, "ask for something simpler, or that this checkpoint's vocabulary can spell")
        if may_stop:
            mask |= grammar.ends_only
        self._mask, self._finished = mask, not may_go_on


@dataclass(frozen=True)
class _Grammar:
    """What the constraints of one request have in common. Masks are `[vocab_size]`; the tokenizer has `token_count`."""

    field: str
    token_count: int
    end_token_ids: frozenset[int]
    ends_only: Mask
    not_ends: Mask

    @property
    def vocab_size(self) -> int:
        return len(self.ends_only)

    def error(self, reason: str, hint: str | None = None) -> InvalidRequest:
        return refused(self.field, reason, hint)


def compile_constraint(
    parameters: DecodingParameters, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Iterable[int] = ()
) -> Callable[[int], Constraint] | None:
    """What gives each sequence, by its index, its own constraint; None where the parameters ask for no structure.

    `parameters` are effective ones, `vocab_size` is the network's, `end_token_ids` are the checkpoint's. A control
    token among `stop_token_ids` counts as an end token, and none of the checkpoint's own does with
    `ignore_end_token`. Raises `InvalidRequest` naming the parameter, with llguidance's reason, for what is invalid,
    not supported or allows no answer. Takes milliseconds to seconds: not for an event loop.
    """
    field = grammar_parameter(parameters)
    if field is None:
        return None
    control = set(tokenizer.control_tokens.values())
    ends = {token_id for token_id in parameters.stop_token_ids if token_id in control}
    if not parameters.ignore_end_token:
        ends |= {token_id for token_id in end_token_ids if token_id < vocab_size}
    ends_only = np.zeros(vocab_size, dtype=np.bool_)
    ends_only[sorted(ends)] = True
    asked = getattr(parameters, field)
    if field == "grammar":
        check_lark(asked, [tokenizer.token_bytes(token_id).decode() for token_id in ends & control])
    source = source_of(field, asked)
    most = LONGEST_CHOICES if field == "choice" else LONGEST_TEXT
    if len(source) > most:
        raise refused(field, f"it has {len(source):,} characters, and {most:,} is the most", "make it shorter")
    token_count = min(tokenizer.vocab_size, vocab_size)
    grammar = _Grammar(field, token_count, frozenset(ends), ends_only, ~ends_only)

    def compiled() -> Constraint:
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(_trie(tokenizer, token_count), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise grammar.error(reason_of(matcher.get_error()), SYNTAX_HINTS[field])
        return Constraint(matcher, grammar)

    first = _within_limits(field, compiled)
    if first.finished:
        raise grammar.error("it allows nothing but the empty text", "allow at least one character")
    return lambda index: first.copy()


@lru_cache(maxsize=16)
def _trie(tokenizer: Tokenizer, token_count: int) -> llguidance.LLTokenizer:
    """llguidance's form of the first `token_count` tokens, made once per checkpoint."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(tokenizer, token_count)))


class _Vocabulary:
    """What llguidance wants to know of a tokenizer.

    Its end token is one that no network has: so a bit of its own says that the grammar may stop, whichever end tokens
    a request has, if any.
    """

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, token_count: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(token_count)] + [b"<end of grammar>"]
        self.eos_token_id = token_count
        control = (token_id for token_id in tokenizer.control_tokens.values() if token_id < token_count)
        self.special_token_ids = [*control, token_count]

    def __call__(self, raw: bytes) -> list[int]:
        """Tokens of text that the grammar leaves no choice about: those that the network was trained to see.

        Where the tokenizer changes a text (by normalising it, say), the longest token at each place is taken instead.
        """
        # In the middle of a text, where SentencePiece puts no space before it.
        token_ids = self._tokenizer.encode_parts([["."], [raw.decode()]])[1]
        known = all(token_id < self.eos_token_id for token_id in token_ids)
        if known and b"".join(self.tokens[token_id] for token_id in token_ids) == raw:
            return token_ids
        return self._longest_first(raw)

    def _longest_first(self, raw: bytes) -> list[int]:
        special = set(self.special_token_ids)
        ids = {token: token_id for token_id, token in enumerate(self.tokens) if token and token_id not in special}
        longest = max(map(len, ids))
        token_ids = []
        at = 0
        while at < len(raw):
            ends = range(min(len(raw), at + longest), at, -1)
            end = next((end for end in ends if raw[at:end] in ids), None)
            if end is None:
                break
            token_ids.append(ids[raw[at:end]])
            at = end
        return token_ids


def _within_limits(field: str, compiled: Callable[[], Constraint]) -> Constraint:
    """`compiled()` on a thread with a deep stack, for at most `COMPILE_SECONDS`.

    llguidance can't be interrupted: past the limit the thread is left behind, without the interpreter's lock, and
    counts among those that compile until it comes to its end. Raises `Overloaded` where these are as many as may be.
    """
    results: list[Constraint | BaseException] = []
    places = _COMPILING

    def work() -> None:
        try:
            results.append(compiled())
        except BaseException as error:  # a panic in llguidance is not an Exception
            results.append(error)
        finally:
            places.release()

    if not places.acquire(timeout=WAIT_SECONDS):
        hint = "try again in a moment"
        raise Overloaded(f"{MOST_COMPILING} other grammars are being compiled", retry_after=5, hint=hint)
    thread = threading.Thread(target=work, name="compile-grammar", daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        except RuntimeError:
            places.release()
            raise
        finally:
            threading.stack_size(before)
    thread.join(COMPILE_SECONDS)
    if not results:
        raise refused(field, f"it takes longer than {COMPILE_SECONDS:g} s to compile", "ask for something simpler")
    result = results[0]
    if isinstance(result, Constraint):
        return result
    if isinstance(result, InvalidRequest):
        raise result
    raise refused(field, f"llguidance failed on it: {result}") from result
