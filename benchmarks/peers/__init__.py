"""Topkapi beside what would be used instead of it: the same weights on the same machine, in turn (see README.md)."""
