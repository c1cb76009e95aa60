"""Tests of autoguidance, with linear denoisers whose guided predictions are known."""

import dataclasses

import flax.linen as nn
import numpy as np
import pytest
import tiny

from conprediff_jax.cli import guide_flag
from conprediff_jax.common.errors import FieldError, UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.models.denoiser import Denoised
from conprediff_jax.runs.api import Model
from conprediff_jax.sampling import record
from conprediff_jax.sampling.autoguidance import guided_by
from conprediff_jax.sampling.model import TrainedModel


class Multiple(nn.Module):
    """Predicts a multiple of the noisy points."""

    num_classes: int | None = None
    discrete = False
    downsampling = 1
    learned_null = False

    @nn.compact
    def __call__(self, x, t, **_):
        return Denoised(self.param("factor", nn.initializers.ones, ()) * x, x)


def trained(factor, frozen=None, **keys):
    config = tiny.get_config()
    config.update_from_flattened_dict({"sampling.steps": 10, **keys})
    denoiser = Multiple(num_classes=config.model.num_classes)
    model = dataclasses.replace(make_experiment(config).task.model, denoiser=denoiser)
    return TrainedModel(model, {"factor": np.float32(factor)}, frozen or {}, 7)


def test_a_guided_model_draws_what_the_sum_of_both_predictions_draws():
    """With factors a and b, and the scale w, the guided prediction has the factor b + w (a - b)."""
    plain = Model(trained(0.0), tiny.mesh_of())
    guided = Model(guided_by(trained(0.3), trained(0.7), "worse"), tiny.mesh_of())

    def expected(factor):
        plain.params = {"factor": np.float32(factor)}
        return plain.sample(4, 3).astype(int)

    assert record.described(guided.trained, "runs/a") == "step 7 of runs/a, guided by worse"
    for scale in (0.0, 2.5):
        drawn = guided.sample(4, 3, guidance=scale)
        assert np.abs(drawn - expected(0.7 + scale * (0.3 - 0.7))).max() <= 1
    alone = expected(0.3)
    assert (np.abs(alone - drawn) > 20).any()
    np.testing.assert_array_equal(guided.sample(4, 3), alone)
    # Times are 0 to 19, and 10 of them are visited. None of these lies below 1 / 40 of all.
    interval = guided.sample(4, 3, guidance=2.5, guidance_interval=(0.0, 0.025))
    np.testing.assert_array_equal(interval, alone)


@pytest.mark.parametrize(
    ("keys", "frozen", "message"),
    [
        ({"first_stage.patch": 4}, {}, r"the guide worse has points of \(2, 2, 48\), the model of"),
        ({"process.prediction": "x0"}, {}, "process is another one: prediction x0 there, v here$"),
        ({"model.num_classes": 5}, {}, "the guide worse knows 5 classes, the model none$"),
        ({}, {"scale": np.float32(1.1)}, "has a first stage of other weights than the model's"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused_in_one_line(keys, frozen, message):
    frozen = frozen or {"scale": np.float32(1.003)}
    with pytest.raises(UserError, match=message):
        guided_by(trained(1, {"scale": np.float32(1)}), trained(1, frozen, **keys), "worse")


def test_the_flag_names_workdir_step_and_average():
    assert guide_flag.parse("gs://a/run") == ("gs://a/run", None, None)
    assert guide_flag.parse("runs/a@b@10") == ("runs/a@b", 10, None)
    assert guide_flag.parse("runs/a:0.10") == ("runs/a", None, 0.1)
    assert guide_flag.parse("runs/a@20:.05") == ("runs/a", 20, 0.05)
    with pytest.raises(FieldError, match=r"guide is '': give WORKDIR"):
        guide_flag.parse("")
