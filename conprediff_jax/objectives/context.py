"""Context prediction as a term: every point predicts the distribution of its neighbourhood.

Source: arXiv 2401.02015; `conprediff_jax.context` has the method. With `decoder` 'direct', every
point predicts its neighbours at their places instead.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Key

from conprediff_jax.context import ContextPrediction
from conprediff_jax.objectives.term import TERMS, Evaluated, Seen, Term


@TERMS.register("context")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextTerm(ContextPrediction, Term):
    """Context prediction from one tap or several.

    The parameters are those of the decoder. With several taps that share none, they are a dict of
    the parameters of every decoder by the name of its tap.
    """

    @property
    def taps(self) -> tuple[str, ...]:
        """The names of the features that the decoders read."""
        return self.tap if self.source == "features" else ()

    def init_params(self, rng: Key[Array, ""], shapes: Seen) -> Any:
        """Returns initial parameters; see the class and `Term`."""

        def init(h: Any) -> Any:
            h, points = jax.eval_shape(self.arranged, h, shapes.points)
            return self.init(
                rng,
                features=h.shape[-1],
                channels=points.shape[-1],
                dimensions=points.ndim - 2,
            )

        if self.source == "prediction":
            return init(shapes.points)
        if len(self.tap) > 1 and not self.shared_decoder:
            return {name: init(shapes.taps[name]) for name in self.tap}
        widths = {name: shapes.taps[name].shape[-1] for name in self.tap}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"shared_decoder is True, and the taps have {widths} channels: they "
                "must have the same number"
            )
        return init(shapes.taps[self.tap[0]])

    def evaluate(self, params: Any, seen: Seen) -> Evaluated:
        """Returns the mean of the losses of all taps, and their distances by stride."""
        losses, metrics = [], {}
        for name in self.tap:
            h = seen.taps[name] if self.source == "features" else seen.estimate()
            own = params if len(self.tap) == 1 or self.shared_decoder else params[name]
            weighted, distance = self.loss(own, h, seen.points, seen.t, seen.rngs)
            losses.append(weighted)
            where = "distance" if len(self.tap) == 1 else f"distance/{name}"
            for stride, column in zip(self.strides, distance.T, strict=True):
                metrics[f"{where}/stride_{stride}"] = column.mean()
        return Evaluated(sum(losses[1:], losses[0]) / len(losses), metrics)
