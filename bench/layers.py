"""Layers of the models that users train, at their own resolution: SD1.x 512 pixels, SD2 768, SDXL 1024; one sample."""

# name: (latent pixels, width, heads, width of the text)
TRANSFORMERS = {
    "SD1.x 32x32": (1024, 640, 8, 768),
    "SD1.x 64x64": (4096, 320, 8, 768),
    "SD1.x 16x16": (256, 1280, 8, 768),
    "SD2 48x48": (2304, 640, 10, 1024),
    "SDXL 64x64": (4096, 640, 10, 2048),
    "SDXL 32x32": (1024, 1280, 20, 2048),
}
TEXT = 77  # tokens of a prompt
RANK = 32
# Batches of latents [B, 4, side, side]: SD1.x at 512 pixels (64), SDXL at 1024 (128).
LATENTS = {
    f"{model} latents, batch {batch}": (batch, side)
    for batch in (4, 32) for model, side in (("SD1.x", 64), ("SDXL", 128))
}


def rows_and_widths() -> dict[str, tuple[int, int]]:
    return {name: (rows, width) for name, (rows, width, *_) in TRANSFORMERS.items()}
