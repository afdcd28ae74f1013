"""Scripts that produce weights."""
