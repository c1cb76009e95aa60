"""Masked input: the denoiser also denoises points some of which are hidden from it.

    L = L_denoise(x_0, t) with the network reading m x_t + (1 - m) e instead of x_t         (1)

m hides a share of the cells of the grid, drawn for every example. e is a learned vector, or for
tokens the mask. The loss counts all points, so what is hidden has to be told from its context. It
costs a second pass through the denoiser. Source: Gao et al. 2023, "Masked Diffusion Transformer"
(MDT, arXiv 2303.14389), without its further blocks, so that the network is the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from conprediff_jax.common.fields import require
from conprediff_jax.context.weighting import derived
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("masked_input")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedInput(Term):
    """Denoising of a partly hidden input, equation (1).

    Attributes:
        hidden_share: The share of cells that are hidden, in (0, 1).
        cell: The side of a cell, in points. It must divide the sides of the grid.
        num_codes: The number of codes of a model of tokens, which is the number of the mask, too;
            None for other models.
    """

    hidden_share: float = 0.3
    cell: int = 1
    num_codes: int | None = derived(None)

    def __post_init__(self):
        super().__post_init__()
        require(self, lambda share: 0 < share < 1, "lie in (0, 1)", "hidden_share")
        require(self, lambda side: side >= 1, "be at least 1", "cell")

    @property
    def taps(self) -> tuple[str, ...]:
        """No taps: the term reads the output alone."""
        return ()

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns the vector e, initially 0; nothing for tokens.

        Raises:
            ValueError: `cell` does not divide a side of the grid.
        """
        del rng
        grid = self._grid(shapes.x_t.shape)
        if any(side % self.cell for side in grid):
            raise ValueError(f"cell is {self.cell}: it must divide the sides of the grid, {grid}")
        if self.num_codes is not None:
            return {}
        return {"mask_embedding": jnp.zeros(shapes.x_t.shape[-1])}

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns (1)."""
        hidden = jax.vmap(lambda rng: self.draw_hidden(rng, self._grid(seen.x_t.shape)))(seen.rngs)
        if self.num_codes is None:
            x = jnp.where(hidden[..., None], params["mask_embedding"], seen.x_t)
        else:
            x = jnp.where(hidden, self.num_codes, seen.x_t)
        return self.mean_distance(seen.denoising_loss(x), seen)

    def draw_hidden(self, rng: Key[Array, ""], grid: tuple[int, ...]) -> Bool[Array, "*grid"]:
        """Draws which points are hidden: the nearest whole number of cells, at least one."""
        cells = tuple(side // self.cell for side in grid)
        order = jax.random.uniform(rng, cells)
        count = max(1, round(self.hidden_share * order.size))
        hidden = order <= jnp.sort(order.reshape(-1))[count - 1]
        for axis in range(len(grid)):
            hidden = jnp.repeat(hidden, self.cell, axis)
        return hidden

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:-1] if self.num_codes is None else shape[1:]
