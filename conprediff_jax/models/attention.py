"""Attention of tokens to tokens, by the kernel that suits the devices.

    attend(query, key, value) = softmax(query key^T / sqrt(size of a head)) value

The plain computation writes the weights of all pairs of tokens to memory. Fused kernels do not
write them: cuDNN's on GPUs, and splash attention on TPUs (a Pallas kernel; Dao et al. 2022, arXiv
2205.14135, for the idea). The results are the same up to rounding.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from conprediff_jax.common.target import Target, target

KINDS = ("auto", "xla", "cudnn", "flash")

_BLOCK = 128  # tokens that a step of the TPU kernel reads; it takes multiples of them
_WIDEST = {"cudnn": 128, "flash": 256}  # channels of a head

Queries = Float[Array, "batch length heads size"]
Context = Float[Array, "batch context_length heads size"]


def check_kind(kind: str) -> None:
    """Raises ValueError if there is no attention of this kind."""
    if kind not in KINDS:
        raise ValueError(f"attention is {kind!r}: choose one of {KINDS}")


def attend(query: Queries, key: Context, value: Context, kind: str = "auto") -> Queries:
    """Returns the values that the queries attend to.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        kind: The kernel to use, where devices, dtype and lengths allow: 'cudnn' on GPUs, 'flash' on
            TPUs, or 'auto' for the one of the devices. Everywhere else, and with 'xla', it is the
            plain computation.

    Raises:
        ValueError: There is no such kind.
    """
    check_kind(kind)
    devices = target()
    fused = {"gpu": "cudnn", "tpu": "flash"}.get(devices.platform)
    if kind == "xla":
        reason = "asked for"
    elif kind not in ("auto", fused):
        reason = f"{kind} does not run on a {devices.platform}"
    else:
        reason = _unfit(fused, query, key, devices)
    _say_once(devices.platform, query.shape[1:], key.shape[1], "xla" if reason else fused, reason)
    if reason:
        return jax.nn.dot_product_attention(query, key, value)
    if fused == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _divided(splash, devices, query, key, value)


def _unfit(fused: str | None, query: Array, key: Array, devices: Target) -> str:
    """Why the fused kernel cannot be used; empty if it can."""
    size = query.shape[-1]
    if fused is None:
        return f"there is no kernel for a {devices.platform}"
    if size > _WIDEST[fused] or size % 8:
        return f"heads of size {size}"
    if fused == "cudnn":
        return "" if query.dtype.itemsize == 2 else f"dtype {query.dtype}"
    if query.shape[1] % _BLOCK or key.shape[1] % _BLOCK:
        return f"lengths that are no multiples of {_BLOCK}"
    if devices.mesh is None and devices.divided:
        return "several devices of an unknown mesh"
    return ""


@functools.cache
def _say_once(platform: str, tokens: tuple[int, ...], context: int, kind: str, why: str) -> None:
    """Logs which kernel is used, once for each shape. CPUs have no choice to speak of."""
    if platform != "cpu":
        length, heads, size = tokens
        logging.info(
            "attention of %d tokens to %d, %d heads of size %d: %s%s",
            length, context, heads, size, kind, f" ({why})" if why else "",
        )  # fmt: skip


def splash(query: Queries, key: Context, value: Context, *, interpret: bool = False) -> Queries:
    """Attention by the TPU's kernel, on one device.

    Args:
        query: The queries; their number is a multiple of 128.
        key: The keys; their number is a multiple of 128.
        value: The values.
        interpret: Whether to interpret the kernel, which is slow and runs on any device.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention  # takes a while, and needs a TPU

    mask = splash_attention.FullMask((query.shape[1], key.shape[1]))
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * query.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = query * np.asarray(query.shape[-1] ** -0.5, query.dtype)
    by_head = (x.swapaxes(1, 2) for x in (scaled, key, value))
    return jax.vmap(kernel)(*by_head).swapaxes(1, 2).astype(query.dtype)


def _divided(attention: Callable[..., Array], devices: Target, *inputs: Array) -> Array:
    """Runs attention on each device for its examples and heads: compilers do not divide kernels."""
    mesh = devices.mesh
    if mesh is None or mesh.size == 1:
        return attention(*inputs)
    batch, _, heads, _ = inputs[0].shape
    examples = int(np.prod([mesh.shape[axis] for axis in devices.batch_axes]))
    spec = PartitionSpec(
        devices.batch_axes if batch % examples == 0 else None,
        None,
        devices.heads_axis if heads % mesh.shape[devices.heads_axis] == 0 else None,
    )
    run = functools.partial(jax.shard_map, mesh=mesh, out_specs=spec, check_vma=False)
    return run(attention, in_specs=(spec,) * len(inputs))(*inputs)
