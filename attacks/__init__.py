"""Searches around an input for one that a model gets wrong. Needs `kernels` alone: models come in as modules."""
