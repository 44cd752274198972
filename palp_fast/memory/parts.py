"""Text encoders and VAE in bytes."""

from __future__ import annotations

from torch import nn

from palp_fast.memory.tape import Buffer, Ledger, Tape, Value
from palp_fast.models import tile_side

_FP32 = 4


def text_saved(encoder: nn.Module, prompts: int, tokens: int, itemsize: int) -> int:
    """What transformers' CLIP keeps of `prompts` prompts for a gradient to its token rows.

    In units of tokens x width, for each layer: the inputs of two normalisations, q, k, v and the result of attention,
    and the activation: of gelu its input, of quick_gelu (x sigmoid(1.702 x)) x and the sigmoid.
    """
    config = encoder.config
    inner = config.intermediate_size * (2 if config.hidden_act == "quick_gelu" else 1)
    per_token = config.num_hidden_layers * ((2 + 4) * config.hidden_size + inner) + 2 * config.hidden_size
    stats = config.num_hidden_layers * (config.num_attention_heads + 4) * _FP32
    return prompts * tokens * (per_token * itemsize + stats)


def text_backward(encoder: nn.Module, prompts: int, tokens: int, itemsize: int) -> int:
    """The most that the backward pass of a layer has beside what was kept: three tensors of the widest kind."""
    return 3 * prompts * tokens * encoder.config.intermediate_size * itemsize


def vae_encode(vae: nn.Module, side: int) -> int:
    """The most that a picture of side x side pixels takes on its way through the encoder."""
    tape = _tape()
    x = tape.make(1, side * side, vae.config.in_channels)
    sample = _conv(tape, x, vae.encoder.conv_in)
    for block in vae.encoder.down_blocks:
        sample = _block(tape, sample, block.resnets, [d.conv for d in block.downsamplers or ()], 1 / 4)
    _middle(tape, sample, vae.encoder)
    return tape.ledger.peak


def vae_decode(vae: nn.Module, side: int, tiles: bool = False) -> int:
    """The most that a picture of side x side pixels takes on its way through the decoder, whole or in tiles."""
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = side // scale
    tile = tile_side(latents)
    if not tiles or tile >= latents:
        return _decode(vae, latents)
    # All tiles are there before they are put together, in rows and then in one.
    sides = [min(tile, latents - first) for first in range(0, latents, tile * 3 // 4)]
    pixel = scale**2 * vae.config.out_channels * _FP32
    return sum(sides) ** 2 * pixel + max(_decode(vae, tile), 2 * latents**2 * pixel)


def _decode(vae: nn.Module, latents: int) -> int:
    tape = _tape()
    z = tape.make(1, latents**2, vae.config.latent_channels)
    sample = _middle(tape, _conv(tape, z, vae.decoder.conv_in), vae.decoder)
    for block in vae.decoder.up_blocks:
        sample = _block(tape, sample, block.resnets, [u.conv for u in block.upsamplers or ()], 4)
    sample = _same(tape, sample)
    sample = _same(tape, sample)
    _conv(tape, sample, vae.decoder.conv_out)
    return tape.ledger.peak


def _tape() -> Tape:
    return Tape(Ledger(), _FP32, grad=False)


def _block(tape: Tape, x: Value, resnets, convs, factor: float) -> Value:
    for resnet in resnets:
        x = _resnet(tape, x, resnet)
    for conv in convs:
        # Padded before a smaller one, enlarged before a larger one.
        pixels = int(x.pixels * factor)
        wide = tape.make(1, max(pixels, x.pixels), x.channels)
        x = tape.make(1, pixels, conv.out_channels)
        del wide
    return x


def _resnet(tape: Tape, x: Value, module) -> Value:
    """diffusers' own: (x + conv2(silu(norm2(conv1(silu(norm1(x))))))) / scale, each a tensor of its own."""
    h = _same(tape, x)
    h = _same(tape, h)
    h = _conv(tape, h, module.conv1)
    h = _same(tape, h)
    h = _same(tape, h)
    h = _conv(tape, h, module.conv2)
    if module.conv_shortcut is not None:
        x = _conv(tape, x, module.conv_shortcut)
    total = _same(tape, x)  # noqa: F841 - alive while it is divided
    return _same(tape, x)


def _middle(tape: Tape, x: Value, part) -> Value:
    resnets, attentions = part.mid_block.resnets, part.mid_block.attentions
    x = _resnet(tape, x, resnets[0])
    for attention, resnet in zip(attentions, resnets[1:]):
        if attention is not None:
            # Normalised input, q, k, v and the result, beside x.
            Buffer(tape.ledger, 6 * x.buffer.nbytes)
        x = _resnet(tape, x, resnet)
    return x


def _conv(tape: Tape, x: Value, layer) -> Value:
    return tape.make(x.rows, x.pixels, layer.out_channels)


def _same(tape: Tape, x: Value) -> Value:
    return tape.make(x.rows, x.pixels, x.channels)
