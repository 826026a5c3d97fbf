"""What the process that reads a pickle and the one that asked for it agree on."""

TENSORS, FACTS, PROBLEM, ALIASES = "tensors.safetensors", "facts", "problem", "aliases"
"""The files that it leaves: tensors, JSON of what lay beside them and of tensors that are one, or what was wrong."""

LARGEST = 1 << 36
"""Bytes of a file that is read at all: 64 GiB."""

SECONDS = 120
"""Of processor time that reading may take, besides a second for every 8 MiB."""
