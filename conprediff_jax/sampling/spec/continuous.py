"""The `sampling` sections of models of continuous points, and the settings of RePaint."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from conprediff_jax.common.errors import FieldError
from conprediff_jax.common.fields import require
from conprediff_jax.diffusion.additive import AdditiveNoise, ContinuousNoise
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.guidance import Guidance
from conprediff_jax.diffusion.samplers import (
    GENERAL_SAMPLERS,
    SAMPLERS,
    RePaint,
    Sampler,
    jump_schedule,
)
from conprediff_jax.diffusion.samplers.ddim import FINALS
from conprediff_jax.diffusion.samplers.ddpm import VARIANCES
from conprediff_jax.sampling.spec.base import SAMPLINGS, SamplingSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousSampling(SamplingSpec):
    """The settings that samplers of continuous models share.

    Attributes:
        clip: Estimates of the clean points are clipped to [-clip, clip]; 0 for no clipping.
        guidance_rescale: How far guidance is rescaled to the deviation without guidance, in [0, 1];
            see `Guidance`.
    """

    clip: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require(self, lambda x: x >= 0, "be positive, or 0 for no limit", "clip")

    def make_guidance(self) -> Guidance:
        """Classifier-free guidance as set here."""
        return dataclasses.replace(super().make_guidance(), rescale=self.guidance_rescale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverSampling(ContinuousSampling):
    """The settings of sections that name one of several samplers.

    Attributes:
        sampler: The sampler, one of the keys of `owned`.
        owned: For every sampler that fits the process, the fields that it reads beside those that
            all samplers read. They are no keys of the others.

    Raises:
        FieldError: A field is out of its range or choices, or belongs to another sampler.
    """

    sampler: str

    owned: ClassVar[Mapping[str, tuple[str, ...]]]

    def __post_init__(self):
        super().__post_init__()
        if self.sampler not in self.owned:
            raise FieldError(
                "sampler",
                f"is {self.sampler!r}, which does not fit the process: choose one of "
                f"{tuple(self.owned)}",
            )
        for name, default in self._of_others(self.sampler).items():
            if getattr(self, name) != default:
                raise FieldError(name, self._refusal(name, getattr(self, name), self.sampler))

    def describe(self) -> str:
        """As in the base class, with the sampler."""
        return f"{self.sampler}, {super().describe()}"

    def with_settings(self, **settings: Any) -> "SolverSampling":
        """As in the base class; another sampler drops the fields that it does not read."""
        sampler = settings.get("sampler", self.sampler)
        for name, default in self._of_others(sampler).items():
            if settings.setdefault(name, default) != default:
                raise FieldError(name, self._refusal(name, settings[name], sampler))
        return super().with_settings(**settings)

    def own_settings(self) -> dict[str, Any]:
        """The fields that the sampler owns, with their values."""
        return {name: getattr(self, name) for name in self.owned[self.sampler]}

    @classmethod
    def _of_others(cls, sampler: str) -> dict[str, Any]:
        """The fields that a sampler does not read, with their defaults."""
        others = {name for names in cls.owned.values() for name in names}
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        return {name: fields[name] for name in sorted(others - set(cls.owned.get(sampler, ())))}

    def _refusal(self, name: str, value: Any, sampler: str) -> str:
        owners = " and ".join(repr(owner) for owner, names in self.owned.items() if name in names)
        return f"is {value!r}: only {owners} reads it, and the sampler is {sampler!r}"


@SAMPLINGS.register("gaussian")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianSampling(SolverSampling):
    """The `sampling` section of diffusion with Gaussian noise in T steps.

    Attributes:
        sampler: 'ddpm', 'ddim' or 'dpm_solver' (DPM-Solver++(2M)); see `diffusion.samplers`.
        spacing: The spacing of the times that are visited: 'leading', 'trailing' or 'linspace'.
        steps_offset: Number that is added to times of 'leading' spacing; the original latent
            diffusion has 1.
        final: Value of alpha_bar at the end of DDIM: 'one', or 'first' as in the original latent
            diffusion.
        eta: Share of DDPM's noise that DDIM adds, in [0, 1].
        step_end: The time at which a step of DDIM ends: 'next' for the time that is visited next,
            or 'stride' for a constant stride, as in diffusers.
        clipped_epsilon: Whether DDIM derives epsilon from the clipped estimate of the clean points.
        variance: Variance of DDPM's noise: 'fixed_small' or 'fixed_large'; see
            `diffusion.samplers.ddpm`.
        time_limit: Only times below this one are visited; 0 for no limit.

    Raises:
        FieldError: A field is out of its range or choices, or belongs to another sampler.
    """

    sampler: str = "ddim"
    spacing: str = "trailing"
    steps_offset: int = 0
    final: str = "one"
    eta: float = 0.0
    step_end: str = "next"
    clipped_epsilon: bool = True
    variance: str = "fixed_small"
    time_limit: int = 0

    owned: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "ddim": ("eta", "final", "step_end", "clipped_epsilon"),
        "ddpm": ("variance",),
        "dpm_solver": (),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.final not in FINALS:
            raise FieldError("final", f"is {self.final!r}: choose one of {FINALS}")
        if self.variance not in VARIANCES:
            raise FieldError("variance", f"is {self.variance!r}: choose one of {VARIANCES}")

    def make(self, process: GaussianProcess) -> Sampler:
        """The sampler for a process.

        Raises:
            ValueError: `steps`, `spacing`, `eta` or `clip` is out of range.
        """
        options = self.own_settings()
        if "final" in options:
            options["final_alpha_bar"] = options.pop("final")
        return GENERAL_SAMPLERS[self.sampler](
            process=process,
            steps=self.steps,
            spacing=self.spacing,
            steps_offset=self.steps_offset,
            clip=self.clip or None,
            time_limit=self.time_limit or None,
            **options,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousTimeSampling(SolverSampling):
    """The settings that the `sampling` sections of processes in continuous time share.

    Attributes:
        spacing: The spacing of the times that are visited: 'trailing' or 'linspace'; see
            `continuous_times`.
        eta: Share of DDPM's noise that DDIM adds, in [0, 1].
    """

    clip: float = 0.0
    spacing: str
    eta: float = 0.0

    def make(self, process: ContinuousNoise) -> Sampler:
        """The sampler for a process.

        Raises:
            ValueError: A field is out of its range or choices.
        """
        return SAMPLERS[self.sampler](
            process=process, steps=self.steps, clip=self.clip or None, **self.own_settings()
        )


@SAMPLINGS.register("flow")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSampling(ContinuousTimeSampling):
    """The `sampling` section of flow matching.

    'euler' and 'heun' follow the flow. 'sde' is SiT's sampler, with 250 steps of which the numbers
    of SiT are published; those of the flow are worse.

    Attributes:
        sampler: 'euler', 'heun', 'sde', 'ddim', 'ddpm' or 'dpm_solver'.
        diffusion: How much noise 'sde' adds at each time; see `SDE`.
        diffusion_scale: A factor of that noise's variance, at least 0.
        last_step: The share of times of the last step of 'sde', which adds no noise.
    """

    sampler: str = "euler"
    spacing: str = "trailing"
    diffusion: str = "sigma"
    diffusion_scale: float = 1.0
    last_step: float = 0.04

    owned: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "euler": ("spacing",),
        "heun": ("spacing",),
        "sde": ("diffusion", "diffusion_scale", "last_step"),
        "ddim": ("spacing", "eta"),
        "ddpm": ("spacing",),
        "dpm_solver": ("spacing",),
    }


@SAMPLINGS.register("edm")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMSampling(ContinuousTimeSampling):
    """The `sampling` section of EDM.

    Attributes:
        sampler: 'heun', 'euler', 'ddim', 'ddpm' or 'dpm_solver'.
        churn: Strength of the noise that 'heun' adds; 0 for none. `Heun` explains it and the next
            three.
        churn_min: Lowest noise level with churn.
        churn_max: Highest noise level with churn; None for no limit.
        churn_noise: Factor of the noise of churn.
    """

    steps: int = 18
    sampler: str = "heun"
    spacing: str = "linspace"
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float | None = None
    churn_noise: float = 1.0

    owned: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "heun": ("spacing", "churn", "churn_min", "churn_max", "churn_noise"),
        "euler": ("spacing",),
        "ddim": ("spacing", "eta"),
        "ddpm": ("spacing",),
        "dpm_solver": ("spacing",),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RePaintSampling(ContinuousSampling):
    """Settings for filling holes by RePaint.

    Attributes:
        jump_length: Number of steps that RePaint takes back; see `RePaint`.
        resamplings: Number of times that each stretch is gone through; see `RePaint`.
    """

    steps: int = 250
    jump_length: int = 10
    resamplings: int = 10

    def describe(self) -> str:
        """As in the base class, with the number of calls of the network."""
        states = jump_schedule(self.steps, self.jump_length, self.resamplings)
        return (
            f"RePaint, {super().describe()}, {(np.diff(states) < 0).sum():,} calls of the network"
        )

    def make(self, process: AdditiveNoise) -> RePaint:
        """The sampler for a process.

        Raises:
            ValueError: A field is out of range.
        """
        return RePaint(
            process=process,
            steps=self.steps,
            clip=self.clip or None,
            jump_length=self.jump_length,
            resamplings=self.resamplings,
        )
