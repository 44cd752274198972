"""emoji-64: the embedded model, its world, and how both were made."""
