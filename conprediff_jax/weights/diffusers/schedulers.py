"""Maps between diffusers' `scheduler_config.json` and our processes and samplers.

    diffusers                       here
    DDIM, DDPM, DPMSolverMultistep  sampler 'ddim', 'ddpm', 'dpm_solver'
    PNDMScheduler                   sampler 'ddim' at the same times, although PNDM is another one
    num_train_timesteps, beta_*     the Gaussian process; 'squaredcos_cap_v2' is our 'cosine'
    prediction_type                 prediction: 'epsilon', 'sample' (x0), 'v_prediction' (v)
    set_alpha_to_one                final: 'one'; False: 'first', the end of the original DDIM
    timestep_spacing, steps_offset  the same; DDIM's steps keep their stride (step_end)
    clip_sample, clip_sample_range  clip
    variance_type                   variance of 'ddpm'
    lambda_min_clipped              time_limit: the first time at which lambda is smaller
    FlowMatchEulerDiscrete, -Heun-  sampler 'euler', 'heun' of flow matching on the linear path
    num_vec_classes                 num_codes + 1, since it counts the mask
    alpha_cum_*, gamma_cum_*        alpha_*, gamma_* of the categorical process

`SCHEDULERS` declares every option of every class: options that are read, options of which only some
values have a counterpart, and options that do not change the samples. Pipelines change some:

    DDIMPipeline                    makes a DDIMScheduler out of any scheduler
    StableDiffusionPipeline         sets steps_offset to 1 and clip_sample to False

The number of steps, eta and guidance are arguments of diffusers' pipelines, and no file holds them.
`use_clipped_model_output` is an argument too, which only DDIMPipeline passes on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.flow import FlowProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.diffusion.samplers.base import SPACINGS
from conprediff_jax.sampling.spec import GaussianSampling
from conprediff_jax.weights.diffusers.options import REQUIRED, DiffusersError, Key, declared

Config = dict[str, Any]

_SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}
_FLOW_SAMPLERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
}
_FLOW_STEPS = 1000
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def _only(default: Any, *others: Any) -> Key:
    """An option of which these values have a counterpart here."""
    return Key(default, fits=(default, *others))


def _without_effect(default: Any) -> Key:
    """An option that does not change the samples."""
    return Key(default, matters=False)


_TIMES = {
    "num_train_timesteps": Key(1000),
    "beta_start": Key(1e-4),
    "beta_end": Key(0.02),
    "beta_schedule": _only("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": _only(None),
    "prediction_type": _only("epsilon", "sample", "v_prediction"),
    "timestep_spacing": Key("leading", fits=SPACINGS),
    "steps_offset": Key(0),
}
_LIMITS = {
    "thresholding": _only(False),
    "dynamic_thresholding_ratio": _without_effect(0.995),  # for thresholding alone
    "sample_max_value": _without_effect(1.0),  # likewise
    "rescale_betas_zero_snr": _only(False),
}
_CLIPPING = {"clip_sample": Key(True), "clip_sample_range": Key(1.0)}

# Of a shift, diffusers applies that of the last time twice.
_FLOW = {"num_train_timesteps": _only(_FLOW_STEPS), "shift": _only(1.0)}

SCHEDULERS: dict[str, dict[str, Key]] = {
    "DDIMScheduler": _TIMES | _LIMITS | _CLIPPING | {"set_alpha_to_one": Key(True)},
    "DDPMScheduler": _TIMES | _LIMITS | _CLIPPING
    # 'fixed_small_log' takes the logarithm and undoes it.
    | {"variance_type": _only("fixed_small", "fixed_small_log", "fixed_large")},
    "DPMSolverMultistepScheduler": _TIMES | _LIMITS
    | {
        "timestep_spacing": Key("linspace", fits=SPACINGS),
        "solver_order": _only(2),
        "algorithm_type": _only("dpmsolver++"),
        "solver_type": _only("midpoint"),
        # With the end at sigma 0, the last step is of first order in any case, and the step
        # before it of second order.
        "final_sigmas_type": _only("zero"),
        "lower_order_final": _without_effect(True),
        "euler_at_final": _without_effect(False),
        "use_karras_sigmas": _only(False),
        "use_exponential_sigmas": _only(False),
        "use_beta_sigmas": _only(False),
        "use_lu_lambdas": _only(False),
        "use_flow_sigmas": _only(False),
        "flow_shift": _without_effect(1.0),  # for flow sigmas alone
        "lambda_min_clipped": Key(-np.inf),
        "variance_type": _only(None),
        "use_dynamic_shifting": _only(False),
        "time_shift_type": _without_effect("exponential"),  # for dynamic shifting alone
    },
    "PNDMScheduler": _TIMES
    | {
        "skip_prk_steps": _without_effect(False),  # for PNDM's own steps
        "set_alpha_to_one": Key(False),
    },
    "FlowMatchEulerDiscreteScheduler": _FLOW
    | {
        "use_dynamic_shifting": _only(False),
        "base_shift": _without_effect(0.5),  # for dynamic shifting alone, as are the next three
        "max_shift": _without_effect(1.15),
        "base_image_seq_len": _without_effect(256),
        "max_image_seq_len": _without_effect(4096),
        "time_shift_type": _without_effect("exponential"),
        "invert_sigmas": _only(False),
        "shift_terminal": _only(None),
        "use_karras_sigmas": _only(False),
        "use_exponential_sigmas": _only(False),
        "use_beta_sigmas": _only(False),
        "stochastic_sampling": _only(False),
    },
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "VQDiffusionScheduler": {
        "num_vec_classes": Key(REQUIRED),
        "num_train_timesteps": Key(100),
        "alpha_cum_start": Key(0.99999),
        "alpha_cum_end": Key(9e-6),
        "gamma_cum_start": Key(9e-6),
        "gamma_cum_end": Key(0.99999),
    },
}  # fmt: skip

FLOW = tuple(_FLOW_SAMPLERS.values())
CONTINUOUS = tuple(name for name in SCHEDULERS if name not in ("VQDiffusionScheduler", *FLOW))

# A scheduler that was made from another one has the other's options in its file, and ignores them.
_DROPPED = {name for keys in SCHEDULERS.values() for name in keys} - {"num_vec_classes"}
_DROPPED |= {"tensor_format", "timestep_values"}  # of diffusers before 0.3; no class reads them


def gaussian_to_diffusers(process: GaussianProcess, sampling: Any, *, pipeline: str = "") -> Config:
    """The config of the scheduler for a process and its sampler.

    Args:
        process: The process.
        sampling: The `GaussianSampling` of the config.
        pipeline: The name of the pipeline, which may change some options.

    Raises:
        DiffusersError: The scheduler cannot do what the settings ask for.
    """
    config = {
        "_class_name": _SAMPLERS[sampling.sampler],
        "num_train_timesteps": process.num_steps,
        "beta_schedule": _SCHEDULES[process.schedule],
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "prediction_type": _PREDICTIONS[process.prediction],
        "timestep_spacing": sampling.spacing,
        "steps_offset": sampling.steps_offset,
    }
    if pipeline == "StableDiffusionPipeline":
        _check_stable(sampling)
        config["steps_offset"] = 1  # which 'trailing' and 'linspace' do not read
    _check_times(process, sampling)
    if sampling.sampler == "dpm_solver":
        return config | _dpm_solver_options(process, sampling)
    config |= {"clip_sample": sampling.clip > 0, "clip_sample_range": sampling.clip or 1.0}
    if sampling.sampler == "ddpm":
        if sampling.variance == "fixed_large" and _ends_early(dataclasses.asdict(sampling)):
            raise DiffusersError(
                f"sampling.variance is 'fixed_large' with spacing {sampling.spacing!r} and "
                f"steps_offset {sampling.steps_offset}: diffusers would add noise in the last "
                "step; set spacing to 'leading' and steps_offset to 0"
            )
        return config | {"variance_type": sampling.variance}
    _check_ddim(process, sampling, pipeline)
    return config | {"set_alpha_to_one": sampling.final == "one"}


def _check_stable(sampling: Any) -> None:
    """Raises DiffusersError for settings that `StableDiffusionPipeline` would change."""
    if sampling.clip:
        raise DiffusersError(
            f"sampling.clip is {sampling.clip}: StableDiffusionPipeline does not clip; set it to 0"
        )
    if sampling.spacing == "leading" and sampling.steps_offset != 1:
        raise DiffusersError(
            f"sampling.steps_offset is {sampling.steps_offset}: StableDiffusionPipeline makes it "
            "1; set it to 1, or sampling.spacing to 'trailing'"
        )


def _check_times(process: GaussianProcess, sampling: Any) -> None:
    """Raises DiffusersError where diffusers would visit other times."""
    if sampling.time_limit and sampling.sampler != "dpm_solver":
        raise DiffusersError(
            f"sampling.time_limit is {sampling.time_limit}: only diffusers' DPM-Solver has one; "
            "set it to 0"
        )
    steps, limit = sampling.steps, sampling.time_limit or process.num_steps
    if sampling.spacing == "trailing" and (
        len(np.arange(limit, 0, -process.num_steps / steps)) != steps
    ):
        raise DiffusersError(
            f"sampling.steps is {steps} with spacing 'trailing': diffusers would round the times "
            f"and visit one below 0; take steps that divide {process.num_steps}"
        )


def _dpm_solver_options(process: GaussianProcess, sampling: Any) -> Config:
    """The time limit as a lambda, half way between the lambdas at the limit and before it."""
    if sampling.clip:
        raise DiffusersError(
            f"sampling.clip is {sampling.clip} with dpm_solver: diffusers' DPM-Solver does not "
            "clip; set it to 0, or sample with ddim or ddpm"
        )
    if sampling.time_limit in (0, process.num_steps):
        return {}
    alpha_bars = process.alpha_bars[sampling.time_limit - 1 : sampling.time_limit + 1]
    return {"lambda_min_clipped": float(0.5 * np.log(alpha_bars / (1 - alpha_bars)).mean())}


def _check_ddim(process: GaussianProcess, sampling: Any, pipeline: str) -> None:
    """Raises DiffusersError where diffusers' DDIM would visit other times or clip differently."""
    sampler = sampling.make(process)
    stride = dataclasses.replace(sampler, step_end="stride")
    if not all(map(np.array_equal, sampler.alpha_bar_steps(), stride.alpha_bar_steps())):
        raise DiffusersError(
            f"sampling.steps is {sampling.steps} with spacing {sampling.spacing!r}: diffusers' "
            f"DDIM moves by {process.num_steps // sampling.steps} at every step, to other times; "
            f"take steps that divide {process.num_steps} with 'trailing', spacing 'leading', or "
            "sampling.step_end 'stride'"
        )
    if sampling.clip and sampling.clipped_epsilon and pipeline not in ("", "DDIMPipeline"):
        raise DiffusersError(
            f"sampling.clip is {sampling.clip} with clipped_epsilon True: {pipeline} cannot "
            "recompute a clipped epsilon; set sampling.clipped_epsilon to False, or clip to 0"
        )


def gaussian_from_diffusers(
    config: Mapping[str, Any], where: str, *, pipeline: str = ""
) -> tuple[Config, Config]:
    """Reads the fields of a `GaussianProcess` and of its `sampling` section from a config.

    Args:
        config: The content of `scheduler_config.json`, with the class that diffusers makes.
        where: The name of the config in errors.
        pipeline: The name of the pipeline, which may change some options.

    Returns:
        The fields of the process, and those of `sampling` without the number of steps and guidance.

    Raises:
        DiffusersError: There is no such process or sampler; the message names the option.
    """
    scheduler = config.get("_class_name")
    if scheduler not in CONTINUOUS:
        raise DiffusersError(f"{where}: holds a {scheduler}; {', '.join(CONTINUOUS)} are read")
    if pipeline == "DDIMPipeline":
        scheduler = "DDIMScheduler"
    values = declared(config, SCHEDULERS[scheduler], where, _DROPPED)
    if pipeline == "StableDiffusionPipeline":
        values |= {"steps_offset": 1, "clip_sample": False}
    process = _process_fields(values)
    try:
        made = GaussianProcess(**process)
    except ValueError as error:
        raise DiffusersError(f"{where}: {error}") from error
    samplers = {theirs: ours for ours, theirs in _SAMPLERS.items()} | {"PNDMScheduler": "ddim"}
    sampling = {"sampler": samplers[scheduler], "spacing": values["timestep_spacing"]}
    # Only 'leading' reads the offset.
    offset = values["steps_offset"] if sampling["spacing"] == "leading" else 0
    sampling |= {"steps_offset": offset, "clip": _clip(values, where)}
    if sampling["sampler"] == "ddim":
        sampling |= _ddim_fields(values, sampling, pipeline)
    if values.get("variance_type") == "fixed_large":
        sampling["variance"] = "fixed_large"
        if _ends_early(sampling):
            raise DiffusersError(
                f"{where}: variance_type is 'fixed_large', and the last time that is visited is "
                "not 0: diffusers adds noise there, and our last step does not"
            )
    if sampling["sampler"] == "dpm_solver":
        sampling["time_limit"] = _time_limit(made, values["lambda_min_clipped"], where)
    if scheduler == "PNDMScheduler":
        logging.warning("%s: is a PNDMScheduler; DDIM takes its place", where)
    return process, sampling


def _ends_early(sampling: Mapping[str, Any]) -> bool:
    """Whether the last time that a sampler visits may be another one than 0."""
    return sampling["spacing"] == "trailing" or bool(sampling["steps_offset"])


def flow_to_diffusers(process: FlowProcess, sampling: Any) -> Config:
    """The config of the scheduler for flow matching and its sampler.

    Args:
        process: The process.
        sampling: The `FlowSampling` of the config.

    Raises:
        DiffusersError: The scheduler cannot do what the settings ask for.
    """
    needed = {
        "process.path": (process.path, "linear"),
        "process.prediction": (process.prediction, "velocity"),
        "process.shift": (process.shift, 1.0),
        "process.time_scale": (process.time_scale, float(_FLOW_STEPS)),
        "sampling.spacing": (sampling.spacing, "linspace"),
        "sampling.clip": (sampling.clip, 0.0),
    }
    if sampling.sampler not in _FLOW_SAMPLERS:
        raise DiffusersError(
            f"sampling.sampler is {sampling.sampler!r}: diffusers' schedulers of flow matching are "
            f"{' and '.join(map(repr, _FLOW_SAMPLERS))}"
        )
    for name, (value, only) in needed.items():
        if value != only:
            raise DiffusersError(
                f"{name} is {value!r}: diffusers' schedulers of flow matching have {only!r}"
            )
    return {
        "_class_name": _FLOW_SAMPLERS[sampling.sampler],
        "num_train_timesteps": _FLOW_STEPS,
        "shift": process.shift,
    }


def flow_from_diffusers(config: Mapping[str, Any], where: str) -> tuple[Config, Config]:
    """Reads the fields of a `FlowProcess` and of its `sampling` section from a config.

    Raises:
        DiffusersError: There is no such process or sampler; the message names the option.
    """
    scheduler = config["_class_name"]
    values = declared(config, SCHEDULERS[scheduler], where, _DROPPED)
    samplers = {theirs: ours for ours, theirs in _FLOW_SAMPLERS.items()}
    sampling = {"sampler": samplers[scheduler], "spacing": "linspace"}
    return {"shift": values["shift"], "time_scale": float(values["num_train_timesteps"])}, sampling


def _process_fields(values: Mapping[str, Any]) -> Config:
    """The fields of a `GaussianProcess`, without those that the cosine schedule does not read."""
    ours = {theirs: name for name, theirs in _SCHEDULES.items()}
    schedule = ours[values["beta_schedule"]]
    predictions = {theirs: name for name, theirs in _PREDICTIONS.items()}
    fields = {
        "schedule": schedule,
        "num_steps": values["num_train_timesteps"],
        "prediction": predictions[values["prediction_type"]],
    }
    if schedule == "cosine":
        return fields
    return fields | {name: float(values[name]) for name in ("beta_start", "beta_end")}


def _clip(values: Mapping[str, Any], where: str) -> float:
    """The limit to which clean points are clipped; 0 for none."""
    if not values.get("clip_sample"):
        return 0.0
    clip = float(values["clip_sample_range"])
    if clip <= 0:
        raise DiffusersError(f"{where}: clip_sample_range is {clip}; it must be above 0")
    return clip


def _ddim_fields(values: Mapping[str, Any], sampling: Mapping[str, Any], pipeline: str) -> Config:
    """The fields of DDIM alone. `step_end` is 'stride' only where it makes a difference."""
    final = "one" if values["set_alpha_to_one"] else "first"
    offset = sampling["steps_offset"]
    same = sampling["spacing"] == "leading" and (offset == 0 or (offset, final) == (1, "first"))
    return {
        "final": final,
        "step_end": "next" if same else "stride",
        "clipped_epsilon": not sampling["clip"] or pipeline == "DDIMPipeline",
    }


def _time_limit(process: GaussianProcess, least: float, where: str) -> int:
    """The first time at which lambda, half the logarithm of the SNR, is below `least`; 0 for none.

    Raises:
        DiffusersError: Lambda is below `least` at all times.
    """
    lambdas = 0.5 * np.log(process.alpha_bars / (1 - process.alpha_bars))
    limit = int(np.sum(lambdas >= least))
    if not limit:
        raise DiffusersError(
            f"{where}: lambda_min_clipped is {least}, which leaves no time; the largest lambda is "
            f"{lambdas[0]:.4g}"
        )
    return 0 if limit == process.num_steps else limit


def fitting_steps(process: Config, sampling: Config, most: int, where: str) -> int:
    """The largest possible number of steps up to a limit.

    Args:
        process: The fields of a `GaussianProcess`.
        sampling: The fields of a `GaussianSampling`.
        most: The limit.
        where: The name of the scheduler in errors.

    Raises:
        DiffusersError: No number of steps is possible.
    """
    made, refused = GaussianProcess(**process), None
    for steps in range(min(most, made.num_steps), 0, -1):
        try:
            GaussianSampling(**sampling, steps=steps).make(made)
            return steps
        except ValueError as error:
            refused = refused or error
    raise DiffusersError(f"{where}: {refused}") from refused


def categorical_to_diffusers(process: CategoricalProcess, sampling: Any) -> Config:
    """The config of a `VQDiffusionScheduler`.

    Raises:
        DiffusersError: The scheduler cannot do what the `sampling` section asks for.
    """
    if sampling.reveal != "posterior" or sampling.tokens_per_call:
        raise DiffusersError(
            f"sampling.reveal is {sampling.reveal!r} with tokens_per_call "
            f"{sampling.tokens_per_call}: VQDiffusionPipeline draws from the posterior; set them "
            "to 'posterior' and 0"
        )
    return {
        "_class_name": "VQDiffusionScheduler",
        "num_vec_classes": process.num_codes + 1,
        "num_train_timesteps": process.num_steps,
        "alpha_cum_start": process.alpha_start,
        "alpha_cum_end": process.alpha_end,
        "gamma_cum_start": process.gamma_start,
        "gamma_cum_end": process.gamma_end,
    }


def categorical_from_diffusers(config: Mapping[str, Any], where: str) -> Config:
    """Reads the fields of a `CategoricalProcess` from the config of a `VQDiffusionScheduler`.

    Raises:
        DiffusersError: There is no such process, or an option is not known.
    """
    values = declared(config, SCHEDULERS["VQDiffusionScheduler"], where)
    fields = {
        "num_codes": values["num_vec_classes"] - 1,
        "num_steps": values["num_train_timesteps"],
        "alpha_start": values["alpha_cum_start"],
        "alpha_end": values["alpha_cum_end"],
        "gamma_start": values["gamma_cum_start"],
        "gamma_end": values["gamma_cum_end"],
    }
    try:
        CategoricalProcess(**fields)
    except ValueError as error:
        raise DiffusersError(f"{where}: {error}") from error
    return fields
