"""Encoders and small nets by name, their weights and checkpoints."""


class ModelError(Exception):
    """Something is wrong with a model, weight file or checkpoint a user named: one line on what, where, what to do."""
