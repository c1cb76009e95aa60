"""The `sampling` sections of configs: how images are drawn from each kind of model."""

import dataclasses
from typing import Any

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import require
from conprediff_jax.common.registry import Registry
from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.guidance import Guidance
from conprediff_jax.diffusion.samplers import SAMPLERS, CategoricalSampler, RePaint, Sampler
from conprediff_jax.diffusion.samplers.ddim import FINALS

# The class of the `sampling` section, by the kind of the process that is sampled.
SAMPLINGS: Registry[type] = Registry("process")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """What the `sampling` sections of all models share.

    Attributes:
        steps: steps, each one call of the denoiser or more.
        guidance: scale of classifier-free guidance; 1 for none.
        guidance_interval: shares of the times in which there is guidance, see `Guidance`.
        num: images of a grid.
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

    def with_settings(self, **settings: Any) -> "SamplingSpec":
        """These settings with others, of the right types, in their place."""
        return dataclasses.replace(self, **settings)

    def make_guidance(self) -> Guidance:
        """Classifier-free guidance as set here."""
        return Guidance(scale=self.guidance, interval=self.guidance_interval)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousSampling(SamplingSpec):
    """What the samplings of continuous models share.

    Attributes:
        clip: limit of the estimated clean points, [-clip, clip]; 0 for none.
        guidance_rescale: share of the deviation taken back after guidance, see `Guidance`.
    """

    clip: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self, lambda x: x >= 0, "be positive, or 0 for no limit", "clip")

    def make_guidance(self) -> Guidance:
        """Classifier-free guidance as set here."""
        return dataclasses.replace(super().make_guidance(), rescale=self.guidance_rescale)


# Fields that no other sampler has, and their defaults.
_OF_DDIM = {"eta": 0.0, "final": "one", "step_end": "next", "clipped_epsilon": True}


@SAMPLINGS.register("gaussian")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianSampling(ContinuousSampling):
    """The `sampling` section of continuous models: grids of a run, and `sample.py` by default.

    Attributes:
        sampler: a key of `diffusion.samplers.SAMPLERS`.
        spacing: which times are visited: 'leading', 'trailing' or 'linspace'.
        steps_offset: added to the times of 'leading'; 1 for the original latent diffusion.
        final: alpha_bar at the end of DDIM: 'one', or 'first' for the original latent diffusion.
        eta: noise of DDIM, 0 for none to 1.
        step_end: where DDIM's steps end: 'next', the time visited next, or 'stride', as diffusers'.
        clipped_epsilon: whether DDIM's estimate of epsilon follows a clipped one of the points.
        time_limit: times visited lie below it; 0 for no limit.
    """

    sampler: str = "ddim"
    spacing: str = "trailing"
    steps_offset: int = 0
    final: str = "one"
    eta: float = 0.0
    step_end: str = "next"
    clipped_epsilon: bool = True
    time_limit: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.sampler not in SAMPLERS:
            raise FieldError("sampler", f"is {self.sampler!r}: choose one of {tuple(SAMPLERS)}")
        if self.final not in FINALS:
            raise FieldError("final", f"is {self.final!r}: choose one of {FINALS}")
        if self.eta and self.sampler != "ddim":
            raise FieldError("eta", _of_ddim(self.eta, self.sampler))

    def make(self, process: GaussianProcess) -> Sampler:
        """The sampler for a process.

        Raises:
            ValueError: steps, spacing, eta or clip are out of range.
        """
        ddim = {
            "eta": self.eta,
            "final_alpha_bar": self.final,
            "step_end": self.step_end,
            "clipped_epsilon": self.clipped_epsilon,
        }
        options = ddim if self.sampler == "ddim" else {}
        return SAMPLERS[self.sampler](
            process=process,
            steps=self.steps,
            spacing=self.spacing,
            steps_offset=self.steps_offset,
            clip=self.clip or None,
            time_limit=self.time_limit or None,
            **options,
        )

    def with_settings(self, **settings: Any) -> "GaussianSampling":
        """As in the base; what DDIM alone has is left behind where another sampler is asked for."""
        sampler = settings.get("sampler", self.sampler)
        if sampler != "ddim":
            for name, default in _OF_DDIM.items():
                if settings.setdefault(name, default) != default:
                    raise FieldError(name, _of_ddim(settings[name], sampler))
        return super().with_settings(**settings)


def _of_ddim(value: Any, sampler: str) -> str:
    return f"is {value!r}: only the sampler 'ddim' has it, and the sampler is {sampler!r}"


@SAMPLINGS.register("mask_and_replace")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSampling(SamplingSpec):
    """The `sampling` section of discrete models; see `CategoricalSampler` for what they do.

    Attributes:
        truncation: share of the mass of a token's distribution that is kept, in (0, 1].
        reveal: 'posterior', 'random' (high-quality inference) or 'purity'.
        tokens_per_call: at most so many tokens are revealed by one call; 0 for no limit.
        purity_weight: how much purer tokens are drawn more sharply; only for 'purity'.
        purity_temperature: 1 chooses tokens in proportion to purity, 0 the purest; only for
            'purity'.
    """

    steps: int = 100
    truncation: float = 0.86
    reveal: str = "posterior"
    tokens_per_call: int = 0
    purity_weight: float = 0.0
    purity_temperature: float = 1.0

    def make(self, process: CategoricalProcess) -> CategoricalSampler:
        """The sampler for a process.

        Raises:
            ValueError: a field is outside its choices or range.
        """
        return CategoricalSampler(
            process=process,
            steps=self.steps,
            truncation=self.truncation,
            reveal=self.reveal,
            tokens_per_call=self.tokens_per_call or None,
            purity_weight=self.purity_weight,
            purity_temperature=self.purity_temperature,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RePaintSampling(ContinuousSampling):
    """How holes are filled by RePaint.

    Attributes:
        jump_length: see `RePaint`.
        resamplings: see `RePaint`.
    """

    steps: int = 250
    jump_length: int = 10
    resamplings: int = 10

    def make(self, process: GaussianProcess) -> RePaint:
        """The sampler for a process.

        Raises:
            ValueError: a field is out of range.
        """
        return RePaint(
            process=process,
            steps=self.steps,
            clip=self.clip or None,
            jump_length=self.jump_length,
            resamplings=self.resamplings,
        )
