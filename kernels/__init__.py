"""Fused operations, each beside its plain PyTorch reference."""
