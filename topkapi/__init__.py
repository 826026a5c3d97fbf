"""Topkapi: from a text file to a served language model."""
