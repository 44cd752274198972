"""Plain PyTorch versions of every operator: the truth in tests and the fallback on every device."""
