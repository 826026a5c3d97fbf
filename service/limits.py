"""How much one request may ask for, besides what fits into a context: said here, in /openapi.json and in docs/api.md.

Every limit is several times what clients have been seen to send. What a decoding parameter may hold is in the table of
parameters; how large a body may be, in the settings.
"""

MOST_PROMPTS = 2048
"""Prompts, texts, pairs or choices in one list, as in OpenAI's embeddings."""

MOST_ANSWERS = 4096
"""Answers of one request: prompts times `n`."""

MOST_MESSAGES = 8192
MOST_PARTS = 1024
"""Parts of one message, and calls in it."""

MOST_TOOLS = 1024

LONGEST_TEXT = 8_000_000
"""Bytes of a text that need not fit into a context: to be scored in windows, or told as tokens."""

MOST_TOKENS = 4_000_000
"""Tokens of one request whose texts need not fit: all that are to be scored, or ids to be told as a text."""

MOST_REPORTED = 4_000_000
"""Tokens and their alternatives that one answer of `/score` reports."""

MOST_SEGMENTS = 10_000
"""Stretches, and surprising tokens, that `/score` tells of each text."""

MOST_UNCUT = 2_000_000
"""Characters of a text without a place where it could be cut, such as a space between two words."""

LONGEST_NAME = 512
"""Characters of a checkpoint's name."""
