"""Raw text and instruction files in, batches of token ids out."""
