"""Shards, streams, transforms and the demo data set."""


class DataError(Exception):
    """Something is wrong with the data a user named: one line that says what, where, and what to do."""
