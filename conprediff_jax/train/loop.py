"""The train loop."""

import json

import grain
import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from conprediff_jax import data, images, parallel
from conprediff_jax.experiment import Experiment, check_devices, make_experiment
from conprediff_jax.sampling import generate_batches, make_generate
from conprediff_jax.train.checkpoint import Checkpoints
from conprediff_jax.train.report import Reporter
from conprediff_jax.train.state import TrainState, abstract_state, init_state
from conprediff_jax.train.step import make_train_step


def train(config: ConfigDict, workdir: str) -> TrainState:
    """Trains a config to its last step, going on where the workdir's newest checkpoint stops.

    Args:
        config: see `config.default`.
        workdir: checkpoints, TensorBoard events and sample grids go here.

    Returns:
        The final state.

    Raises:
        ConfigError: the config does not fit itself or the machine; nothing has been written then.
        DataError: the data are missing or do not fit the config.
        CheckpointError: the workdir holds a run of another model, or nothing readable.
        DivergedError: the loss became NaN or infinite.
    """
    experiment = make_experiment(config)
    check_devices(experiment, jax.device_count(), jax.process_count())
    mesh = parallel.make_mesh(experiment.mesh)
    spec = experiment.train
    optimizer = experiment.optimizer.make(spec.steps)
    abstract = abstract_state(experiment, optimizer, mesh)
    batches = _open_batches(experiment)
    plain_config = json.loads(config.to_json())

    with Checkpoints(workdir, keep=spec.keep) as checkpoints:
        state = checkpoints.restore(abstract, batches, plain_config)
        if state is None:
            state = init_state(experiment, optimizer, abstract)
        start = int(state.step)
        if start >= spec.steps:
            logging.info("%s: all %d steps are done", workdir, spec.steps)
            return state
        reporter = Reporter(workdir, spec, start, lambda: _last_good(checkpoints))
        try:
            _introduce(experiment, mesh, state, workdir, reporter)
            train_step = make_train_step(experiment, optimizer, abstract, mesh)
            preview = _Preview(experiment, mesh, workdir, reporter)
            for step in range(start + 1, spec.steps + 1):
                batch = parallel.to_global(_arrays(experiment, next(batches)), mesh)
                state, metrics = train_step(state, batch)
                reporter.add(step, metrics)
                last = step == spec.steps
                if last or step % spec.checkpoint_every == 0:
                    reporter.check()  # never save what has diverged
                    checkpoints.save(state, batches, plain_config)
                if last or (spec.sample_every and step % spec.sample_every == 0):
                    preview(step, state.ema)
        finally:
            reporter.close()
        checkpoints.wait()
        logging.info("checkpoints: %s", checkpoints.folder)
        logging.info("TensorBoard events: tensorboard --logdir %s", workdir)
    return state


def _open_batches(experiment: Experiment) -> grain.DatasetIterator:
    """This process's batches, the first of them checked and put back."""
    batch_size = experiment.train.batch_size // jax.process_count()
    batches = data.make_iterator(
        experiment.data,
        batch_size=batch_size,
        seed=experiment.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    beginning = batches.get_state()
    data.check_batch(
        next(batches),
        experiment.data,
        batch_size=batch_size,
        num_classes=experiment.denoiser.num_classes,
    )
    batches.set_state(beginning)
    return batches


def _arrays(experiment: Experiment, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parts of a batch that the step uses."""
    used = ("image", "label") if experiment.denoiser.num_classes else ("image",)
    return {name: batch[name] for name in used}


def _introduce(
    experiment: Experiment, mesh: Mesh, state: TrainState, workdir: str, reporter: Reporter
) -> None:
    """Says what is about to be trained, on what and where to."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(state.params)
    reporter.text("parameters", table)
    if not int(state.step):
        logging.info("parameters\n%s", table)
    context = experiment.context
    logging.info(
        "%s: %d images of %d x %d -> points %s; %s",
        experiment.data.name,
        data.num_examples(experiment.data),
        experiment.data.image_size,
        experiment.data.image_size,
        " x ".join(map(str, experiment.point_shape)),
        f"context strides {context.strides}, weight {context.weight}"
        if context
        else "no context prediction",
    )
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    logging.info("%s on %s (%s)", workdir, mesh.devices.flat[0].device_kind, axes)
    logging.info(
        "%s step %d of %d", "resuming at" if int(state.step) else "starting at",
        int(state.step), experiment.train.steps,
    )  # fmt: skip


class _Preview:
    """Sample grids of the run, of the same seeds every time: one sees the same images emerge."""

    def __init__(self, experiment: Experiment, mesh: Mesh, workdir: str, reporter: Reporter):
        self._experiment, self._reporter = experiment, reporter
        self._folder = epath.Path(workdir) / "samples"
        sampler = experiment.sampling.make(experiment.process)
        self._generate = make_generate(experiment, sampler, mesh)

    def __call__(self, step: int, ema) -> None:
        jax.block_until_ready(ema)
        with self._reporter.progress.paused():
            num = self._experiment.sampling.num
            batches = generate_batches(
                self._generate,
                ema,
                seed=self._experiment.seed,
                num=num,
                batch_size=min(num, 64),
                num_classes=self._experiment.denoiser.num_classes,
            )
            grid = images.grid(np.concatenate(list(batches)))
            if jax.process_index() == 0:
                path = self._folder / f"step_{step:07}.png"
                images.write_png(path, grid)
                self._reporter.image(step, "samples", grid)
                logging.info("sample grid: %s", path)


def _last_good(checkpoints: Checkpoints) -> str:
    step = checkpoints.latest_step
    return "none yet" if step is None else str(checkpoints.folder / str(step))
