"""Encoders and small nets by name, their weights and checkpoints."""


class ModelError(Exception):
    """Something is wrong with a model, weights file or checkpoint a user named: one line that says what, where, what to do."""
