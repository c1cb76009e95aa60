"""Compares the train step of a UNet with that of the same UNet of diffusers in `torch.compile`.

    pip install -e ".[cuda,test]"     # and a torch that has CUDA
    python benchmarks/diffusers_step.py --config=configs/celebahq.py --config.train.batch_size=16

Both steps do the same on one device, from the same parameters and in the config's `dtype`: they add
noise, predict it, compute the loss and its gradient, clip it, and update by AdamW and the moving
average. The step of diffusers uses the channels-last layout, fused AdamW, and autocast for
bfloat16. Points are random latents, or random images if the config works on pixels. Only the step
of the last row has context prediction. Steps are timed in turn, round after round, and the medians
are compared. The MFU of both, on a GPU, uses the FLOPs of the JAX step.

Before that, both networks get the same inputs: `outputs differ by` is the largest difference of
their outputs relative to the largest output.
"""

import os
import time

import diffusers
import jax
import numpy as np
import torch
from absl import flags
from study.steps import TimedStep, time_in_turn

from conprediff_jax.cli import app, config_flag
from conprediff_jax.common.errors import UserError
from conprediff_jax.config.experiment import make_experiment
from conprediff_jax.models import FIRST_STAGES
from conprediff_jax.models.first_stage import Latents
from conprediff_jax.models.unet import UNet
from conprediff_jax.weights.diffusers import unet as diffusers_unet
from conprediff_jax.xla.chips import peak_flops

_CONFIG = config_flag.define("configs/openmoji.py")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed steps of each kind.", lower_bound=1)
_MODE = flags.DEFINE_enum(
    "mode", "default", ["default", "reduce-overhead", "max-autotune", "eager"],
    "Mode of torch.compile; 'eager' to leave it out.",
)  # fmt: skip

HERE, THERE, CONTEXT = "here", "diffusers", "here, with context prediction"


class DiffusersStep:
    """The train step of diffusers' UNet and its state, with the parameters of ours.

    Attributes:
        model: The UNet.
        seconds: Seconds of every step so far.
    """

    def __init__(self, ours: TimedStep):
        model, spec = ours.experiment.task.model, ours.experiment.optimizer
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = diffusers_unet.config_to_diffusers(
            model.denoiser, model.point_shape[-1], model.point_shape[0]
        )
        self.model = diffusers.UNet2DModel.from_config(config)
        weights = diffusers_unet.params_to_diffusers(
            jax.device_get(ours.state.params["denoiser"]), model.denoiser
        )
        self.model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()})
        self.model.to(self._device, memory_format=torch.channels_last)
        self._scheduler = diffusers.DDPMScheduler(num_train_timesteps=model.process.num_steps)
        self._scheduler.alphas_cumprod = self._scheduler.alphas_cumprod.to(self._device)
        self._average = [p.detach().clone() for p in self.model.parameters()]
        self._decay = ours.experiment.train.ema_decay
        self._clip = spec.clip_norm or float("inf")
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.learning_rate, betas=(spec.b1, spec.b2),
            eps=spec.epsilon, weight_decay=spec.weight_decay, fused=True,
        )  # fmt: skip
        self._half = jax.numpy.dtype(model.denoiser.dtype) == jax.numpy.bfloat16
        self._num_classes = model.num_classes
        compiled = _MODE.value != "eager"
        self._apply = torch.compile(self.model, mode=_MODE.value) if compiled else self.model
        shape = (ours.experiment.train.batch_size, *model.point_shape)
        self._points = self._to_device(torch.randn(shape).movedim(-1, 1))
        self.seconds: list[float] = []

    def predict(self, x: np.ndarray, t: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
        """The output for an input `[B, rows, columns, channels]`, in the same order of axes."""
        x = self._to_device(torch.from_numpy(x).movedim(-1, 1))
        labels = None if labels is None else torch.from_numpy(labels).to(self._device)
        with torch.no_grad(), self._autocast():
            found = self.model(x, torch.from_numpy(t).to(self._device), labels).sample
        return found.float().movedim(1, -1).cpu().numpy()

    def run(self) -> None:
        """Takes one step and appends its time to `seconds`."""
        began = time.perf_counter()
        batch, labels = len(self._points), None
        t = torch.randint(self._scheduler.config.num_train_timesteps, (batch,), device=self._device)
        if self._num_classes:
            labels = torch.randint(self._num_classes, (batch,), device=self._device)
        noise = torch.randn_like(self._points)
        with self._autocast():
            found = self._apply(self._scheduler.add_noise(self._points, noise, t), t, labels).sample
        torch.nn.functional.mse_loss(found.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self._average, list(self.model.parameters()), 1 - self._decay)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self._device, memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._half)


def difference(ours: TimedStep, theirs: DiffusersStep) -> float:
    """The largest difference of the networks' outputs, relative to the largest output."""
    model, rng = ours.experiment.task.model, np.random.default_rng(0)
    x = rng.normal(size=(2, *model.point_shape)).astype(np.float32)
    t = np.array([1, model.process.num_steps // 2])
    labels = np.array([0, 1]) if model.num_classes else None
    params = ours.state.params["denoiser"]
    found = np.asarray(
        jax.jit(lambda p: model.denoiser.apply({"params": p}, x, t, label=labels).output)(params)
    )
    expected = theirs.predict(x, t, labels)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(argv: list[str]) -> None:
    """Prints the table."""
    del argv
    # Both frameworks share the memory of the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch.set_float32_matmul_precision("high")  # the default of XLA on GPUs
    if jax.device_count() > 1:
        raise UserError(
            f"there are {jax.device_count()} devices, but torch would use one: make one visible, "
            "for example by CUDA_VISIBLE_DEVICES=0"
        )
    config = _CONFIG.value.copy_and_resolve_references()
    if FIRST_STAGES[config.first_stage.kind].first_stage is Latents:
        config.data.latents = "random"
    context, config.context.weight = config.context.weight, 0.0
    model = make_experiment(config).task.model
    if not isinstance(model.denoiser, UNet) or model.text:
        raise UserError("--config: the denoiser must be a UNet without captions")
    steps = {HERE: TimedStep(config)}
    steps[HERE].run()  # since all outputs of a new UNet are zero
    steps[THERE] = DiffusersStep(steps[HERE])
    print(f"outputs differ by {difference(steps[HERE], steps[THERE]):.1e}")
    if context:
        config.context.weight = context
        steps[CONTEXT] = TimedStep(config)
    medians = time_in_turn(steps, _ROUNDS.value, warm_up=3)
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    print(f"{device.device_kind}, {config.dtype}, torch.compile: {_MODE.value}")
    print(f"{'step':32} {'ms':>8} {'time':>7} {'MFU':>7}")
    for name, seconds in medians.items():
        flops = steps[HERE if name == THERE else name].flops
        mfu = f"{flops / seconds / peak:7.1%}" if peak else f"{'-':>7}"
        print(f"{name:32} {seconds * 1e3:8.1f} {seconds / medians[THERE]:7.3f} {mfu}")


if __name__ == "__main__":
    app.run(main)
