"""Kernels of attention: the same numbers as the plain computation, and chosen by the devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from tiny import mesh_of

from conprediff_jax.common.target import Target, traced_for
from conprediff_jax.models import attention
from conprediff_jax.models.attention import attend
from conprediff_jax.models.dit import DiT
from conprediff_jax.models.transformer import TokenTransformer
from conprediff_jax.models.unet import UNet

LENGTHS = {"self": (128, 128), "cross": (128, 256)}


def drawn(batch, length, context, heads=2, size=32, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, size) for n in (length, context, context)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def gradients(attention_of):
    def loss(*inputs):
        return (attention_of(*inputs) ** 2).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def lowered(platform, devices, *, size=32, length=128, dtype=jnp.bfloat16, kind="auto"):
    """The program of the gradient for a platform that need not be here."""
    inputs = [jax.ShapeDtypeStruct((2, length, 2, size), dtype)] * 3

    def loss(*inputs):
        return attend(*inputs, kind).astype(jnp.float32).sum()

    called = [
        export.DisabledSafetyCheck.custom_call(f"__cudnn$fmhaSoftmax{s}") for s in ("", "Backward")
    ]
    with traced_for(devices):
        program = export.export(
            jax.jit(jax.grad(loss, (0, 1, 2))), platforms=[platform], disabled_checks=called
        )(*inputs)
    return program.mlir_module()


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_the_kernel_of_tpus_equals_the_plain_computation(lengths):
    inputs = drawn(2, *lengths)
    value, grads = gradients(functools.partial(attention.splash, interpret=True))(*inputs)
    expected, expected_grads = gradients(jax.nn.dot_product_attention)(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("heads", [2, 3])
def test_a_kernel_runs_on_every_device_for_its_own_examples_and_heads(heads, monkeypatch):
    """Three heads are not divided over two devices: each of the two computes all of them."""
    seen, mesh = [], mesh_of(8, data=2, fsdp=2, tensor=2)

    def plain(query, key, value):
        seen.append(query.shape)
        return jax.nn.dot_product_attention(query, key, value)

    monkeypatch.setattr(attention, "splash", plain)
    inputs = drawn(8, 128, 128, heads)
    with traced_for(Target("tpu", mesh, ("data", "fsdp"), "tensor")):
        value, grads = gradients(attend)(*inputs)
    assert set(seen) == {(2, 128, 1 if heads == 2 else 3, 32)}
    expected, expected_grads = gradients(jax.nn.dot_product_attention)(*inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_programs_for_tpus_hold_the_kernel_where_it_fits():
    tpu = Target("tpu", mesh_of())
    assert lowered("tpu", tpu).count("tpu_custom_call") == 3  # forward, and two backward
    assert lowered("tpu", tpu, length=64).count("tpu_custom_call") == 0
    assert lowered("tpu", tpu, kind="xla").count("tpu_custom_call") == 0
    assert lowered("tpu", tpu, kind="cudnn").count("tpu_custom_call") == 0


def test_programs_for_gpus_hold_cudnns_attention_in_both_passes(monkeypatch):
    """JAX asks which cuDNN and which GPU there are; the test answers, since neither is here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    gpu = Target("gpu", mesh_of())
    program = lowered("cuda", gpu)
    assert "__cudnn$fmhaSoftmax" in program and "__cudnn$fmhaSoftmaxBackward" in program
    assert "__cudnn" not in lowered("cuda", gpu, dtype=jnp.float32)
    assert "__cudnn" not in lowered("cuda", gpu, size=160)
    assert "__cudnn" not in lowered("cuda", gpu, kind="flash")


UNET = {"out_channels": 3, "channels": 32, "channel_mult": (1,), "attention_downsampling": (1,)}
TOKENS = {"num_codes": 5, "grid": (16, 16), "width": 32, "num_layers": 1, "num_heads": 1}
IMAGE, CODES = ((2, 16, 16, 3), jnp.float32), ((2, 16, 16), jnp.int32)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (functools.partial(UNet, **UNET, head_channels=32), IMAGE),
        (
            functools.partial(DiT, out_channels=3, patch=1, width=32, num_layers=1, num_heads=1),
            IMAGE,
        ),
        (functools.partial(TokenTransformer, **TOKENS), CODES),
    ],
    ids=["unet", "dit", "transformer"],
)
def test_every_denoiser_hands_its_choice_to_its_attention(model, x):
    inputs = jnp.zeros(*x), jnp.zeros(2, jnp.int32)

    def calls(kind):
        network = model(attention=kind)
        with traced_for(Target("tpu", mesh_of())):
            text = str(
                jax.make_jaxpr(lambda: network.init_with_output(jax.random.key(0), *inputs))()
            )
        return text.count("pallas_call")

    assert calls("auto") > 0 and calls("xla") == 0
    with pytest.raises(ValueError, match=r"attention is 'fast': choose one of .*'flash'"):
        model(attention="fast")
