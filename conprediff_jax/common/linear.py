"""Dense layers, convolutions and embedding tables whose parameters get float32 gradients.

Activations may be bfloat16, but the gradient of a parameter is a sum over all examples and places,

    dL/dW = sum_n x_n g_n^T,    dL/db = sum_n g_n,                                          (1)

first on each device, then over the devices. Flax's own layers cast parameters to the dtype of the
activations before they use them, so both sums are computed in this dtype and cast back afterwards.
A sum of bfloat16 over devices is rounded at every addition, and its error grows with the number of
devices. The layers here cast parameters inside the product, so the products and sums of (1) are
float32, as in Megatron-LM (`--accumulate-allreduce-grads-in-fp32`) and with FSDP's `reduce_dtype`.

There is one exception: cuDNN returns the dtype that it is given, so on GPUs (1) has the dtype of
the activations for kernels of convolutions. With float32 activations, the layers compute what
Flax's layers compute. Names, shapes and initial values of parameters are Flax's.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

PRODUCT = "product"  # names what the layers return, for blocks that are recomputed

Images = Float[Array, "batch height width channels"]
Kernel = Float[Array, "rows columns channels features"]
Strides = tuple[int, int]
Pads = tuple[tuple[int, int], tuple[int, int]]


def _inputs_alone(x: Any, *params: Any, dtype: DTypeLike | None) -> tuple:
    """Casts inputs to the dtype of the activations and leaves parameters in their own."""
    return jnp.asarray(x, dtype or jnp.float32), *jax.tree.map(jnp.asarray, params)


class Dense(nn.Dense):
    """`x W + b` over the last axis, in `dtype` (None: float32); see the module docstring."""

    promote_dtype: Any = _inputs_alone
    dot_general: Any = lambda x, kernel, *_, **__: product(x, kernel)

    def __call__(self, inputs: Float[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        """Maps every row of `channels` numbers to one of `features`."""
        y = super().__call__(inputs).astype(self.dtype or jnp.float32)
        return checkpoint_name(y, PRODUCT)


class Conv(nn.Conv):
    """A convolution of images in `dtype` (None: float32); see the module docstring."""

    promote_dtype: Any = _inputs_alone
    conv_general_dilated: Any = lambda *inputs, **_: _padded_convolution(*inputs)

    def __call__(self, inputs: Images) -> Float[Array, "batch height2 width2 features"]:
        """Maps images to images of `features` channels."""
        y = super().__call__(inputs).astype(self.dtype or jnp.float32)
        return checkpoint_name(y, PRODUCT)


class Embed(nn.Embed):
    """Rows of a table, in `dtype` (None: float32); see the module docstring."""

    promote_dtype: Any = _inputs_alone

    def __call__(self, inputs: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
        """The rows with these indices."""
        return jnp.take(self.embedding, inputs, axis=0).astype(self.dtype or jnp.float32)


@jax.custom_vjp
def product(
    x: Float[Array, "*batch channels"], kernel: Float[Array, "channels features"]
) -> Float[Array, "*batch features"]:
    """`x @ kernel` in the dtype of `x`; the gradient of the kernel has the kernel's dtype."""
    # x is made a matrix, since XLA needs twice as long on a CPU for a gradient that is a sum over
    # several axes.
    y = x.reshape(-1, x.shape[-1]) @ kernel.astype(x.dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    flat_x, flat_g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    to_x = flat_g @ kernel.astype(g.dtype).T
    examples = (((0,), (0,)), ((), ()))
    to_kernel = lax.dot_general(flat_x, flat_g, examples, preferred_element_type=kernel.dtype)
    return to_x.reshape(x.shape), to_kernel


product.defvjp(_product_forward, _product_backward)


def _padded_convolution(
    x: Images, kernel: Kernel, strides: Strides, padding: str | list[tuple[int, int]]
) -> Float[Array, "batch height2 width2 features"]:
    """`convolution` with padding in Flax's notation."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return convolution(x, kernel, strides, tuple(padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    x: Images, kernel: Kernel, strides: Strides, pads: Pads
) -> Float[Array, "batch height2 width2 features"]:
    """A convolution in the dtype of `x`; the gradient of the kernel has the kernel's dtype.

    The exception are GPUs, see the module docstring.

    Args:
        x: Images.
        kernel: The kernel, float32.
        strides: Strides of rows and columns.
        pads: Numbers of zeros before and after the rows and the columns.
    """
    return _convolution(strides, pads, x, kernel.astype(x.dtype))


def _convolution(strides: Strides, pads: Pads, x: Array, kernel: Array) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=layout)


def _convolution_forward(
    x: Array, kernel: Array, strides: Strides, pads: Pads
) -> tuple[Array, tuple[Array, Array]]:
    return convolution(x, kernel, strides, pads), (x, kernel)


def _convolution_backward(
    strides: Strides, pads: Pads, saved: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    of_x = functools.partial(_convolution, strides, pads, kernel=kernel.astype(x.dtype))
    (to_x,) = jax.linear_transpose(of_x, x)(g)

    # Equation (1): the images of every channel, convolved with the gradients of every feature. The
    # padding at the end is chosen such that the result has the size of the kernel.
    sizes = zip(kernel.shape, x.shape[1:], g.shape[1:], strides, pads, strict=False)
    places = [(before, k + (m - 1) * stride - n - before) for k, n, m, stride, (before, _) in sizes]
    correlation = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1, 1),
        padding=places,
        rhs_dilation=strides,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
    )

    def as_given(x: Array, g: Array) -> Array:
        return correlation(x, g).astype(kernel.dtype)

    widened = functools.partial(correlation, preferred_element_type=kernel.dtype)
    return to_x, lax.platform_dependent(x, g, cuda=as_given, rocm=as_given, default=widened)


convolution.defvjp(_convolution_forward, _convolution_backward)
