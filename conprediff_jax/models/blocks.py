"""Stacks of equal blocks, and blocks that are computed again in the backward pass.

A stack runs as one `nn.scan`, so that its program has the length of one block and compiles in the
time of one. The parameters of the blocks are stacked under `blocks/...`: the first axis counts the
blocks. The features after each block can be tapped under the names `block_1` .. `block_{count}`.
Taps count the blocks that were computed, so they begin at 1.
"""

from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conprediff_jax.common.linear import PRODUCT

# What a block that is recomputed keeps for the backward pass: nothing, or the products of its
# layers. The layers name their products, since the policies of JAX do not look into functions with
# a gradient of their own. Both recompute the products of attention, which grow with the square of
# the number of tokens.
REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
    "nothing": None,
    "products": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}

Features = Float[Array, "batch *place channels"]


def tap_names(count: int) -> tuple[str, ...]:
    """The names of the features after each of `count` blocks, in the order of computation."""
    return tuple(f"block_{number}" for number in range(1, count + 1))


def recomputed(block: type[nn.Module], remat: bool, policy: str = "nothing") -> type[nn.Module]:
    """The class of a single block, which is computed again in the backward pass with `remat`.

    Args:
        block: The class of the block.
        remat: Whether it is computed again.
        policy: What is kept nevertheless; a key of `REMAT_POLICIES`.
    """
    return nn.remat(block, policy=REMAT_POLICIES[policy]) if remat else block


def check_policy(policy: str) -> None:
    """Raises ValueError if there is no such policy."""
    if policy not in REMAT_POLICIES:
        raise ValueError(f"remat_policy is {policy!r}: choose one of {tuple(REMAT_POLICIES)}")


def run(
    block: nn.Module,
    x: Features,
    *inputs: Array | None,
    count: int,
    taps: Sequence[str] = (),
    unroll: bool = False,
    remat: bool = False,
    policy: str = "nothing",
) -> tuple[Features, dict[str, Features]]:
    """Runs a stack of blocks. Call it inside the `__call__` of a module.

    Args:
        block: The block, whose name is that of the stack. It maps features and `inputs` to features
            of the same shape.
        x: The features before the first block.
        *inputs: What all blocks read.
        count: The number of blocks.
        taps: The features to return as well, of `tap_names(count)`.
        unroll: Whether the program has the blocks one after another instead of a loop.
        remat: Whether the blocks are computed again in the backward pass.
        policy: What is kept nevertheless; a key of `REMAT_POLICIES`.

    Returns:
        The features after the last block, and the tapped ones by name.
    """
    numbers = {name: tap_names(count).index(name) + 1 for name in taps}

    def body(block: nn.Module, carry: tuple, number: Array) -> tuple[tuple, None]:
        x, tapped = carry
        x = block(x, *inputs)
        tapped = {name: jnp.where(number == numbers[name], x, h) for name, h in tapped.items()}
        return (x, tapped), None

    if remat:
        # XLA cannot merge the two computations of a loop's body, so only unrolled blocks need a
        # barrier between them.
        body = nn.remat(body, policy=REMAT_POLICIES[policy], prevent_cse=unroll)
    # The output of one block cannot be taken out of a scan, so the scan carries it along. Outputs
    # of the scan would hold those of all blocks.
    carry = (x, dict.fromkeys(taps, x))
    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        unroll=count if unroll else 1,
    )
    return scan(block, carry, jnp.arange(1, count + 1))[0]
