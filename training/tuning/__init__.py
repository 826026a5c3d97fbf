"""A checkpoint trained on: on conversations, on pairs of answers, on answers with a verdict."""
