"""What the `sampling` sections of all models share."""

import dataclasses
from typing import Any

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.registry import Registry
from conprediff_jax.diffusion.guidance import Guidance

# The class of the `sampling` section, by the kind of the process that is sampled.
SAMPLINGS: Registry[type] = Registry("process")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """The settings that the `sampling` sections of all models share.

    Attributes:
        steps: Number of steps; each calls the denoiser once or more.
        guidance: Scale of classifier-free guidance; 1 for no guidance.
        guidance_interval: Interval of times with guidance, as shares of all times in [0, 1]; see
            `Guidance`.
        num: Number of images in a sample grid.

    Raises:
        FieldError: A field is out of range.
    """

    steps: int = 50
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    num: int = 64

    def __post_init__(self):
        if self.num < 1:
            raise FieldError("num", f"is {self.num}: it must be at least 1")
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        self.make_guidance()  # raises ValueError

    def describe(self) -> str:
        """How images are drawn, in words for the log."""
        return f"{self.steps} steps" + (
            f", guidance {self.guidance:g}" if self.guidance != 1 else ""
        )

    def with_settings(self, **settings: Any) -> "SamplingSpec":
        """These settings with some fields replaced by values of the right types."""
        return dataclasses.replace(self, **settings)

    def make_guidance(self) -> Guidance:
        """Classifier-free guidance as set here."""
        return Guidance(scale=self.guidance, interval=self.guidance_interval)
