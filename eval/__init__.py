"""Scripts that produce numbers and figures from weights."""
