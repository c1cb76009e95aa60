"""Published networks in torch, with the parameter names of their checkpoints.

They are the UNet of ADM and latent diffusion (guided-diffusion, latent-diffusion), the transformer
of VQ-Diffusion without its diffusion process, and the text encoders of both. `to_original` writes
our parameters as the state dicts of these networks.
"""

import copy
import math

import torch
from torch import nn

from conprediff_jax.models.autoencoder import AutoencoderKL, VQModel
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.original import autoencoder as original_autoencoder
from conprediff_jax.weights.original import text as original_text
from conprediff_jax.weights.original import transformer as original_transformer
from conprediff_jax.weights.original import unet as original_unet


def to_original(params, model, *, new_attention_order=False):
    """The state dict that the original code would save of the parameters of a model."""
    match model:
        case UNet():
            channels = params["input_conv"]["kernel"].shape[2]
            table = original_unet.table(model, channels, new_attention_order)
        case VQModel() | AutoencoderKL():
            channels = params["encoder"]["input_conv"]["kernel"].shape[2]
            table = original_autoencoder.table(model, channels)
        case TokenTransformer():
            table = original_transformer.table(model)
        case _:
            table = original_text.table(model)
    return table.write(params)


class Residual(nn.Module):
    """ADM's residual block: the change of resolution is inside it; the embedding adds or scales."""

    def __init__(self, ins, outs, embedding, shift, change=None):
        super().__init__()
        self.shift, self.change = shift, change
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, ins), nn.SiLU(), nn.Conv2d(ins, outs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outs * (1 + shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outs), nn.SiLU(), nn.Identity(), nn.Conv2d(outs, outs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1)

    def resize(self, x):
        if self.change == "up":
            return nn.functional.interpolate(x, scale_factor=2)
        return nn.functional.avg_pool2d(x, 2) if self.change else x

    def forward(self, x, e):
        norm, act, conv = self.in_layers
        h = conv(self.resize(act(norm(x))))
        e = self.emb_layers(e)[..., None, None]
        if self.shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(self.resize(x)) + h


class SelfAttention(nn.Module):
    """One convolution for query, key and value, split behind (new order: before) the heads."""

    def __init__(self, channels, heads, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, e):
        batch, channels, *size = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        width = channels // self.heads
        if self.new_order:
            q, k, v = (part.reshape(batch * self.heads, width, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(batch * self.heads, 3 * width, -1).split(width, dim=1)
        weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(width), dim=-1)
        attended = torch.einsum("bts,bcs->bct", weights, v).reshape(batch, channels, -1)
        return (flat + self.proj_out(attended)).reshape(batch, channels, *size)


class Convolved(nn.Module):
    """A change of resolution by a convolution: `op` down, `conv` up."""

    def __init__(self, channels, change):
        super().__init__()
        self.change = change
        if change == "down":
            self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, e):
        if self.change == "down":
            return self.op(x)
        return self.conv(nn.functional.interpolate(x, scale_factor=2))


class Plain(nn.Conv2d):
    def forward(self, x, e):
        return super().forward(x)


class OriginalUNet(nn.Module):
    """The block lists of ADM and latent diffusion, in the order in which they are numbered."""

    def __init__(self, unet, channels_in, new_order=False):
        super().__init__()
        self.channels, width = unet.channels, 4 * unet.channels
        self.time_embed = nn.Sequential(
            nn.Linear(unet.channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        if unet.num_classes:
            self.label_emb = nn.Embedding(unet.num_classes, width)

        def block(ins, outs, change=None):
            return Residual(ins, outs, width, unet.scale_shift_norm, change)

        def attention(h):
            return SelfAttention(h, unet.num_heads or h // unet.head_channels, new_order)

        def change(h, way):
            return block(h, h, way) if unet.resblock_updown else Convolved(h, way)

        h, factor = unet.channels, 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([Plain(channels_in, h, 3, padding=1)])])
        skips = [h]
        for level, mult in enumerate(unet.channel_mult):
            for _ in range(unet.blocks_per_level):
                layers = [block(h, mult * unet.channels)]
                h = mult * unet.channels
                if factor in unet.attention_downsampling:
                    layers.append(attention(h))
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(h)
            if level < len(unet.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([change(h, "down")]))
                skips.append(h)
                factor *= 2
        self.middle_block = nn.ModuleList([block(h, h), attention(h), block(h, h)])
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(unet.channel_mult))):
            for i in range(unet.blocks_per_level + 1):
                layers = [block(h + skips.pop(), mult * unet.channels)]
                h = mult * unet.channels
                if factor in unet.attention_downsampling:
                    layers.append(attention(h))
                if level and i == unet.blocks_per_level:
                    layers.append(change(h, "up"))
                    factor //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, h), nn.SiLU(), nn.Conv2d(h, unet.out_channels, 3, padding=1)
        )

    def forward(self, x, t, label=None):
        half = self.channels // 2
        angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        e = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        if label is not None:
            e = e + self.label_emb(label)
        skips = []
        for layers in self.input_blocks:
            for layer in layers:
                x = layer(x, e)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, e)
        for layers in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in layers:
                x = layer(x, e)
        return self.out(x)


class Ada(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.emb, self.linear = nn.Embedding(count, width), nn.Linear(width, 2 * width)

    def forward(self, x, index):
        e = self.linear(nn.functional.silu(self.emb(index)))[:, None]
        scale, shift = e.chunk(2, dim=2)
        return nn.functional.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class Heads(nn.Module):
    def __init__(self, width, context, heads):
        super().__init__()
        self.heads = heads
        self.query, self.proj = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(context, width), nn.Linear(context, width)

    def forward(self, x, context):
        q, k, v = (
            layer(y).reshape(len(y), y.shape[1], self.heads, -1).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def gelu2(x):
    return x * torch.sigmoid(1.702 * x)


class Convolutions(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(4 * width, width, 3, padding=1)

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        grid = x.transpose(1, 2).reshape(len(x), -1, side, side)
        return self.conv2(gelu2(self.conv1(grid))).flatten(2).transpose(1, 2)


class Dense(nn.Sequential):
    def __init__(self, width):
        super().__init__(nn.Linear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x):
        return self[2](gelu2(self[0](x)))


class OriginalBlock(nn.Module):
    def __init__(self, model):
        super().__init__()
        width, text = model.width, model.text_dim
        self.ln1 = Ada(width, model.num_steps)
        self.ln2 = Ada(width, model.num_classes) if model.num_classes else nn.LayerNorm(width)
        if text:
            self.attn1, self.ln1_1 = (
                Heads(width, width, model.num_heads),
                Ada(width, model.num_steps),
            )
            self.attn2 = Heads(width, text, model.num_heads)
        else:
            self.attn = Heads(width, width, model.num_heads)
        self.mlp = (Convolutions if model.convolutional else Dense)(width)

    def forward(self, x, t, label, text):
        h = self.ln1(x, t)
        x = x + (self.attn if text is None else self.attn1)(h, h)
        if text is not None:
            x = x + self.attn2(self.ln1_1(x, t), text)
        return x + self.mlp(self.ln2(x) if label is None else self.ln2(x, label))


class OriginalTransformer(nn.Module):
    def __init__(self, model):
        super().__init__()
        places, width = getattr(model, "position_grid", None) or model.grid, model.width
        self.content_emb = nn.ModuleDict(
            {
                "emb": nn.Embedding(model.num_codes + 1, width),
                "height_emb": nn.Embedding(places[0], width),
                "width_emb": nn.Embedding(places[1], width),
            }
        )
        self.blocks = nn.ModuleList([OriginalBlock(model) for _ in range(model.num_layers)])
        self.to_logits = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, model.num_codes))

    def forward(self, x, t, label=None, text=None):
        rows, columns = (self.content_emb[name].weight for name in ("height_emb", "width_emb"))
        places = (rows[:, None] + columns[None]).flatten(0, 1)  # maybe more than there are tokens
        h = self.content_emb["emb"](x) + places[: x.shape[1]]
        for block in self.blocks:
            h = block(h, t, label, text)
        return self.to_logits(h)


class OriginalBERT(nn.Module):
    """Latent diffusion's, of x-transformers: attention and feed-forward layers in one list."""

    def __init__(self, encoder):
        super().__init__()
        width, inner = encoder.width, encoder.num_heads * encoder.head_channels
        self.heads = encoder.num_heads
        self.token_emb = nn.Embedding(encoder.vocab_size, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(encoder.length, width)})
        layers = nn.ModuleList()
        for _ in range(encoder.num_layers):
            project = {f"to_{part}": nn.Linear(width, inner, bias=False) for part in "qkv"}
            project["to_out"] = nn.Linear(inner, width)
            layers.append(nn.ModuleList([nn.LayerNorm(width), nn.ModuleDict(project)]))
            hidden = nn.Sequential(nn.Linear(width, encoder.hidden), nn.GELU())
            net = nn.Sequential(hidden, nn.Dropout(0.0), nn.Linear(encoder.hidden, width))
            feed_forward = nn.ModuleDict({"net": net})
            layers.append(nn.ModuleList([nn.LayerNorm(width), feed_forward]))
        self.attn_layers = nn.ModuleDict({"layers": layers})
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.token_emb(tokens) + self.pos_emb["emb"].weight
        for norm, layer in self.attn_layers["layers"]:
            if "net" in layer:
                x = x + layer["net"](norm(x))
                continue
            q, k, v = (
                layer[f"to_{part}"](norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in "qkv"
            )
            attended = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["to_out"](attended.transpose(1, 2).flatten(2))
        return self.norm(x)


class OriginalCLIP(nn.Module):
    """OpenAI's text tower; torch's own attention has the stacked projections."""

    def __init__(self, encoder):
        super().__init__()
        width = encoder.width
        self.token_embedding = nn.Embedding(encoder.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.zeros(encoder.length, width))
        self.ln_final = nn.LayerNorm(width)
        mlp = {"c_fc": nn.Linear(width, encoder.hidden), "c_proj": nn.Linear(encoder.hidden, width)}
        blocks = [
            nn.ModuleDict(
                {
                    "attn": nn.MultiheadAttention(width, encoder.num_heads, batch_first=True),
                    "ln_1": nn.LayerNorm(width),
                    "mlp": nn.ModuleDict({k: copy.deepcopy(layer) for k, layer in mlp.items()}),
                    "ln_2": nn.LayerNorm(width),
                }
            )
            for _ in range(encoder.num_layers)
        ]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        later = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for block in self.transformer["resblocks"]:
            h = block["ln_1"](x)
            x = x + block["attn"](h, h, h, attn_mask=later, need_weights=False)[0]
            h = block["mlp"]["c_fc"](block["ln_2"](x))
            x = x + block["mlp"]["c_proj"](gelu2(h))
        return self.ln_final(x)
