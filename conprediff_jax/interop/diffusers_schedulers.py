"""Schedules and samplers to and from diffusers' `scheduler_config.json`.

    PNDMScheduler                   read as 'ddim' at the same times, which is not the same sampler
    num_train_timesteps, beta_*     the Gaussian process; 'squaredcos_cap_v2' is our 'cosine'
    prediction_type                 prediction: 'epsilon', 'sample' (x0), 'v_prediction' (v)
    DDIM, DDPM, DPMSolverMultistep  sampler: 'ddim', 'ddpm', 'dpm_solver'
    set_alpha_to_one                final: 'one'; False: 'first', the end of the original DDIM
    steps_offset                    steps_offset; 1 for the original `range(0, T, c) + 1`
    clip_sample, clip_sample_range  clip
    num_vec_classes                 num_codes + 1, for the mask
    alpha_cum_*, gamma_cum_*        alpha_*, gamma_* of the categorical process

The numbers of steps, eta and guidance are arguments of diffusers' pipelines and not in the files.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from conprediff_jax.diffusion.categorical import CategoricalProcess
from conprediff_jax.diffusion.gaussian import GaussianProcess
from conprediff_jax.interop.diffusers_options import DiffusersError, Options

Config = dict[str, Any]

_SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm_solver": "DPMSolverMultistepScheduler",
}
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
_PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def gaussian_to_diffusers(
    process: GaussianProcess, sampling: Any, *, stable: bool = False
) -> Config:
    """The config of a scheduler.

    Args:
        process: The process.
        sampling: The `sampling` section's object.
        stable: Whether it is for `StableDiffusionPipeline`, which sets `steps_offset` to 1 and
            `clip_sample` to False, whatever they are.

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
    if stable:
        if sampling.clip:
            raise DiffusersError(
                f"sampling.clip is {sampling.clip}: StableDiffusionPipeline does not clip; set it "
                "to 0"
            )
        if sampling.spacing == "leading" and sampling.steps_offset != 1:
            raise DiffusersError(
                f"sampling.steps_offset is {sampling.steps_offset}: StableDiffusionPipeline makes "
                "it 1; set it to 1, or sampling.spacing to 'trailing'"
            )
        config["steps_offset"] = 1  # which 'trailing' and 'linspace' do not read
    if sampling.sampler == "dpm_solver":
        if sampling.clip:
            raise DiffusersError(
                f"sampling.clip is {sampling.clip} with dpm_solver: diffusers' DPM-Solver does not "
                "clip; set it to 0, or sample with ddim or ddpm"
            )
        return config
    times = sampling.make(process).times
    stride = process.num_steps // sampling.steps
    if sampling.sampler == "ddim" and (np.diff(times) != -stride).any():
        raise DiffusersError(
            f"sampling.steps is {sampling.steps} with spacing {sampling.spacing!r}: diffusers' "
            f"DDIM goes on by {stride} at every step, to other times; take steps that divide "
            f"{process.num_steps} with 'trailing', or spacing 'leading'"
        )
    config |= {"clip_sample": sampling.clip > 0, "clip_sample_range": sampling.clip or 1.0}
    if sampling.sampler == "ddpm":
        return config | {"variance_type": "fixed_small"}
    return config | {"set_alpha_to_one": sampling.final == "one"}


def gaussian_from_diffusers(config: Mapping[str, Any], where: str) -> tuple[Config, Config]:
    """Fields of `GaussianProcess` and of the `sampling` section out of a scheduler's config.

    Args:
        config: What `scheduler_config.json` holds.
        where: What to call it in errors.

    Raises:
        DiffusersError: There is no such process or sampler; the message names the option.
    """
    options = Options(config, where)
    samplers = {theirs: ours for ours, theirs in _SAMPLERS.items()}
    samplers["PNDMScheduler"] = "ddim"
    sampler = samplers.get(config.get("_class_name"))
    if sampler is None:
        raise DiffusersError(
            f"{where}: holds a {config.get('_class_name')}; {', '.join(samplers)} are read"
        )
    schedule = _inverse(_SCHEDULES, options, "beta_schedule", "linear")
    process = {
        "schedule": schedule,
        "num_steps": options.take("num_train_timesteps", 1000),
        "beta_start": options.take("beta_start", 1e-4),
        "beta_end": options.take("beta_end", 0.02),
        "prediction": _inverse(_PREDICTIONS, options, "prediction_type", "epsilon"),
    }
    spacing = "linspace" if sampler == "dpm_solver" else "leading"
    sampling = {
        "sampler": sampler,
        "spacing": options.take("timestep_spacing", spacing),
        "steps_offset": options.take("steps_offset", 0),
    }
    if sampling["spacing"] != "leading":  # nothing else reads it
        sampling["steps_offset"] = 0
    options.expect(trained_betas=None, thresholding=False, rescale_betas_zero_snr=False)
    options.ignore("dynamic_thresholding_ratio", "sample_max_value")
    if config["_class_name"] == "PNDMScheduler":
        logging.warning("%s: a PNDMScheduler; DDIM is taken in its place", where)
        options.ignore("skip_prk_steps", "clip_sample")
        options.expect(set_alpha_to_one=False)
        sampling |= {"clip": 0.0, "final": "first"}
    elif sampler == "dpm_solver":
        sampling["clip"] = 0.0
        _expect_dpm_solver(options)
    else:
        clip = options.take("clip_sample_range", 1.0)
        sampling["clip"] = float(clip) if options.take("clip_sample", True) else 0.0
    if config["_class_name"] == "DDIMScheduler":
        sampling["final"] = "one" if options.take("set_alpha_to_one", True) else "first"
    if sampler == "ddpm":
        options.expect(variance_type="fixed_small")
    options.finish()
    return process, sampling


def _expect_dpm_solver(options: Options) -> None:
    """DPM-Solver++(2M) ending at the clean end, whatever it does there: see our sampler."""
    options.expect(
        solver_order=2,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        final_sigmas_type="zero",
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        use_lu_lambdas=False,
        use_flow_sigmas=False,
        use_dynamic_shifting=False,
        variance_type=None,
    )
    options.ignore(
        *("lower_order_final", "euler_at_final", "flow_shift", "time_shift_type"),
        "lambda_min_clipped",
    )


def _inverse(names: Mapping[str, str], options: Options, option: str, default: str) -> str:
    """Our name of a value of an option."""
    theirs = options.take(option, default)
    for ours, name in names.items():
        if name == theirs:
            return ours
    raise DiffusersError(
        f"{options.where}: {option} is {theirs!r}; {', '.join(names.values())} have a counterpart "
        "here"
    )


def categorical_to_diffusers(process: CategoricalProcess, sampling: Any) -> Config:
    """The config of a `VQDiffusionScheduler`.

    Raises:
        DiffusersError: It cannot do what the `sampling` section asks for.
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
    """Fields of `CategoricalProcess` out of the config of a `VQDiffusionScheduler`.

    Raises:
        DiffusersError: It is of another scheduler, or has an option that is not known.
    """
    if config.get("_class_name") != "VQDiffusionScheduler":
        raise DiffusersError(
            f"{where}: holds a {config.get('_class_name')}; tokens have a VQDiffusionScheduler"
        )
    options = Options(config, where)
    fields = {
        "num_codes": options.take("num_vec_classes", 0) - 1,
        "num_steps": options.take("num_train_timesteps", 100),
        "alpha_start": options.take("alpha_cum_start", 0.99999),
        "alpha_end": options.take("alpha_cum_end", 9e-6),
        "gamma_start": options.take("gamma_cum_start", 9e-6),
        "gamma_end": options.take("gamma_cum_end", 0.99999),
    }
    options.finish()
    return fields
