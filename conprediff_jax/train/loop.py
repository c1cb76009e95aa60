"""The train loop."""

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Collection, Iterator

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from conprediff_jax import data, parallel
from conprediff_jax.common import images, opening
from conprediff_jax.common.errors import UserError, printable
from conprediff_jax.common.files import WriteError, absolute, write_text, writing
from conprediff_jax.common.lock import locked
from conprediff_jax.common.trees import flatten
from conprediff_jax.config.experiment import Experiment, check_devices, make_experiment
from conprediff_jax.config.sections import Change, build, naming, shown
from conprediff_jax.config.vocabulary import with_vocabulary
from conprediff_jax.metrics.bootstrap import Figure
from conprediff_jax.metrics.results import ResultsTable
from conprediff_jax.metrics.small import SmallEvaluation
from conprediff_jax.parallel.processes import Preemption
from conprediff_jax.runs import restore
from conprediff_jax.runs.batches import Batches
from conprediff_jax.runs.changes import allowed_changes
from conprediff_jax.runs.checkpoint import Checkpoints, newest_config
from conprediff_jax.runs.classes import with_class_names, with_stored_vocabulary
from conprediff_jax.sampling import record
from conprediff_jax.sampling.generate import make_preview
from conprediff_jax.tasks.optimizer import OptimizerSpec
from conprediff_jax.tasks.state import TrainState, abstract_state, gathered, init_state
from conprediff_jax.tasks.step import make_train_step
from conprediff_jax.train import frozen, logs
from conprediff_jax.train.report import Reporter
from conprediff_jax.train.start_from import start_from
from conprediff_jax.train.throughput import MeasuredStep

EVALUATED = 256  # number of samples of a small evaluation
_OF_FIRST, _SHORT = 64, 120  # images of the first batch that are shown; letters of a caption


def train(
    config: ConfigDict,
    workdir: str,
    *,
    allow_changes: bool = False,
    command: str = "",
    log: Collection[str] = (),
) -> TrainState:
    """Trains a config to its last step, and continues from the newest checkpoint in the workdir.

    Args:
        config: The config; see `config.default`.
        workdir: Folder for checkpoints, metrics and sample grids.
        allow_changes: Whether a run may continue with other data, classes or seed, or another first
            stage.
        command: The command line, which TensorBoard shows; may be empty.
        log: Logs besides TensorBoard and metrics.jsonl: 'wandb', or none.

    Returns:
        The final state.

    Raises:
        ConfigError: The config is wrong or does not fit the devices; nothing has been written.
        DataError: The data are missing or do not fit the config.
        CheckpointError: The workdir holds a run of another model, or no readable checkpoint.
        FieldError: A guarded key has changed, and changes are not allowed; or there is no such log.
        LockedError: Another program trains into the workdir.
        DivergedError: The loss became NaN or infinite.
        Preempted: Some process received SIGTERM; the last step has been saved.
        Interrupted: The command was stopped by Ctrl-C; the last step has been saved.
        WriteError: A file cannot be written; the message names the last good checkpoint.
    """
    began = time.monotonic()
    logs.check(log)
    stored = newest_config(workdir)
    config = with_class_names(with_vocabulary(with_stored_vocabulary(config, stored)), stored)
    changed = allowed_changes(config, stored, workdir, allow_changes)
    experiment = make_experiment(config)
    check_devices(experiment, jax.device_count(), jax.process_count())
    with naming("config.mesh"):
        mesh = parallel.make_mesh(experiment.mesh)
    batches = _open_batches(experiment, mesh)
    record = _Record(workdir, json.loads(config.to_json()), changed, command, tuple(log))
    with locked(workdir, hold=jax.process_index() == 0):
        return _train(experiment, mesh, batches, record, began)


def _train(
    experiment: Experiment, mesh: Mesh, batches: Batches, record: "_Record", began: float
) -> TrainState:
    """Trains in a workdir that belongs to this run alone; see `train`."""
    workdir, config, spec = record.workdir, record.config, experiment.train
    task, optimizer = experiment.task, experiment.optimizer.make(spec.steps)
    abstract = abstract_state(task, optimizer, mesh, spec.power_averages, spec.divide_update)
    checkpoints = Checkpoints(workdir, keep=spec.keep, keep_every=spec.keep_every)
    preemption = Preemption(checkpoints.goes_on)
    _open(experiment, mesh, workdir)
    with preemption, _naming_last_good(checkpoints, workdir), checkpoints:
        state = checkpoints.restore(abstract, batches, config)
        if state is None:
            state = _prepared(init_state(task, optimizer, abstract), experiment, mesh)
        elif record.changes_networks:
            state = _with_other_networks(state, experiment, mesh)
        if experiment.data.latents:
            frozen.check_latents(task, state.task_state)
        start = int(state.step)
        if start >= spec.steps:
            logging.info("%s: all %d steps are done", workdir, spec.steps)
            return state
        if start:
            _compare_learning_rates(experiment, checkpoints.config(start), start)
        reporter = Reporter(workdir, spec, start, lambda: checkpoints.last_good, began, record.log)
        key, unit = _shaped(experiment)
        train_step = MeasuredStep(
            make_train_step(task, spec, experiment.optimizer, abstract, mesh),
            start,
            spec.profile,
            workdir,
            [(h // unit, w // unit) for h, w in experiment.data.shapes] if key else (),
        )
        reporter.measure(train_step)
        try:
            _introduce(experiment, state, workdir, reporter)
            record.write(reporter, start)
            observe = _Observer(experiment, mesh, workdir, reporter)
            shapes = collections.Counter()
            for step in range(start + 1, spec.steps + 1):
                batch = reporter.fetch(batches)
                if step == 1:
                    _show_first(batch, experiment.data.text, reporter)
                if key:
                    shapes[tuple(unit * side for side in batch[key].shape[1:3])] += 1
                batch = parallel.to_global({k: batch[k] for k in task.batch_keys}, mesh)
                state, metrics = train_step(state, batch)
                reporter.add(step, metrics)
                stop = preemption.reached() and step < spec.steps
                if stop or spec.saves_after(step):
                    reporter.check()  # never save what has diverged
                    with reporter.progress.paused():
                        checkpoints.save(state, batches, config)
                    _log_shapes(shapes)
                if stop:
                    checkpoints.wait()
                    raise preemption.reason(step)
                observe(step, state)
        finally:
            train_step.close()
            reporter.close()
        checkpoints.wait()
        logging.info("checkpoints: %s; TensorBoard: --logdir %s", checkpoints.folder, workdir)
    return state


def _shaped(experiment: Experiment) -> tuple[str, int]:
    """The key of batches whose shape varies, and the pixels of its points; '' if none does."""
    if not experiment.data.aspect_step:
        return "", 1
    if experiment.data.latents:
        return "latent", experiment.task.model.first_stage.downsampling
    return "image", 1


def _log_shapes(shapes: collections.Counter[tuple[int, int]]) -> None:
    """Logs how many batches of each shape came since the program started, if there are several."""
    if shapes:
        said = (f"{w} x {h}: {count}" for (h, w), count in sorted(shapes.items()))
        logging.info("batches by shape of their images: %s", ", ".join(said))


@contextlib.contextmanager
def _naming_last_good(checkpoints: Checkpoints, workdir: str) -> Iterator[None]:
    """Adds the last good checkpoint to the message when nothing can be written to the workdir."""
    try:
        with writing(workdir):
            yield
    except WriteError as error:
        raise WriteError(f"{error}; last good checkpoint: {checkpoints.last_good}") from error


def _compare_learning_rates(experiment: Experiment, stored: dict, start: int) -> None:
    """Logs a warning if the learning rate jumps because the config has changed since the save."""
    with contextlib.suppress(UserError):  # another version with other keys wrote the config
        before = build(OptimizerSpec, ConfigDict(stored), "optimizer")
        old = float(before.learning_rates(stored["train"]["steps"])(start))
        new = float(experiment.optimizer.learning_rates(experiment.train.steps)(start))
        if not np.isclose(old, new, rtol=1e-3, atol=0):
            logging.warning(
                "the learning rate goes on at %.3g where the run before was at %.3g: the schedule "
                "is %s over %d steps now, and was %s over %d before",
                new, old, experiment.optimizer.schedule, experiment.train.steps, before.schedule,
                stored["train"]["steps"],
            )  # fmt: skip


def _prepared(state: TrainState, experiment: Experiment, mesh: Mesh) -> TrainState:
    """A fresh state with parameters that are loaded, measured, or taken from another model."""
    if experiment.train.init_from:
        return start_from(experiment.train.init_from, state, experiment.task)
    task_state = frozen.prepare(experiment.task, lambda: _open_batches(experiment, mesh))
    if task_state is None:
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.task_state)
    return state.replace(task_state=jax.device_put(task_state, shardings))


def _with_other_networks(state: TrainState, experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state of a run that continues with the first stage or the text encoder of its config."""
    prepared = frozen.prepare(experiment.task, lambda: _open_batches(experiment, mesh))
    loaded, held = prepared["frozen"], state.task_state["frozen"]
    placed = jax.device_put(loaded, jax.tree.map(lambda leaf: leaf.sharding, held))
    return state.replace(task_state=state.task_state | {"frozen": placed})


@dataclasses.dataclass(frozen=True)
class _Record:
    """What is known of a run from its beginning, for its workdir and its logs.

    Attributes:
        workdir: The workdir.
        config: The whole config as plain data.
        changes: What has changed since the run was saved.
        command: The command line; may be empty.
        log: Names of logs besides those that every run has.
    """

    workdir: str
    config: dict
    changes: list[Change]
    command: str
    log: tuple[str, ...]

    @property
    def changes_networks(self) -> bool:
        """Whether networks that are not trained come from another place than before."""
        return any(change.key in ("first_stage.weights", "text.weights") for change in self.changes)

    def write(self, reporter: Reporter, step: int) -> None:
        """Writes config.json and the texts, and logs the changes."""
        if jax.process_index() == 0:
            text = json.dumps(self.config, indent=2)
            write_text(epath.Path(self.workdir) / "config.json", text + "\n")
        reporter.config(self.config)
        keys = flatten(self.config).items()
        reporter.text("config", "\n".join(f"{key} = {shown(value)}" for key, value in keys), step)
        if self.command:
            reporter.text("command", self.command, step)
        for change in self.changes:
            logging.info("changed: %s", change)
        if self.changes:
            reporter.text("changes", "\n".join(map(str, self.changes)), step)


def _open_batches(experiment: Experiment, mesh: Mesh) -> Batches:
    """This process's share of the batches, after a check of the first batch."""
    with naming("config.mesh"):
        index, count = parallel.batch_share(mesh)
    batch_size = experiment.train.batch_size // count
    iterator = data.make_iterator(
        experiment.data,
        batch_size=batch_size,
        seed=experiment.seed,
        process_index=index,
        process_count=count,
        tokenizer=experiment.task.tokenizer,
        exchange=parallel.exchange(mesh),
    )
    beginning = iterator.get_state()
    data.check_batch(
        next(iterator),
        experiment.data,
        batch_size=batch_size,
        num_classes=experiment.task.num_classes,
        tokenizer=experiment.task.tokenizer,
    )
    iterator.set_state(beginning)
    return Batches(iterator, (index, count))


def _open(experiment: Experiment, mesh: Mesh, workdir: str) -> None:
    """Logs what is trained, on which data and devices, and into which workdir."""
    (height, width, _), source = experiment.data.image_shape, data.open_data(experiment.data)
    known, named = experiment.task.num_classes, source.class_names or ()
    if known and len(named) > known:
        raise data.DataError(
            f"{experiment.data.name}: has {len(named)} classes; the model knows {known}"
        )
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    opening.say(
        f"{len(source)} images of {experiment.data.name} as {width} x {height} pixels",
        f"a model of {experiment.task.describe()}",
        workdir,
        on=f"{opening.devices()}{f' ({axes})' if axes else ''}",
    )


def _introduce(experiment: Experiment, state: TrainState, workdir: str, reporter: Reporter) -> None:
    """Logs the networks, and lists their parameters in a file."""
    from clu import parameter_overview

    table = parameter_overview.get_parameter_overview(state.params, include_stats="sharding")
    reporter.text("parameters", table)
    if jax.process_index() == 0:
        write_text(epath.Path(workdir) / "parameters.txt", table + "\n")
    for name, module in state.params.items():
        count = sum(leaf.size for leaf in jax.tree.leaves(module))
        logging.info("%s: %s parameters, listed in parameters.txt", name, f"{count:,}")
    logging.info(
        "%s step %d of %d", "resuming at" if int(state.step) else "starting at",
        int(state.step), experiment.train.steps,
    )  # fmt: skip


def _show_first(batch: dict[str, np.ndarray], text: str | None, reporter: Reporter) -> None:
    """Shows in TensorBoard what the first step of a run learns from: images, with their captions.

    Args:
        batch: This process's share of the batch.
        text: The key of the captions, or None.
        reporter: What writes to TensorBoard, in the first process.
    """
    if jax.process_index() or "image" not in batch:
        return
    pictures = batch["image"][:_OF_FIRST]
    if text is not None:
        captions = [printable(str(caption))[:_SHORT] for caption in batch[text][:_OF_FIRST]]
        pictures = images.captioned(pictures, captions)
    reporter.image(1, "data/first_batch", images.grid(pictures))


class _Observer:
    """Makes sample grids and small evaluations of the moving average when they are due."""

    def __init__(self, experiment: Experiment, mesh: Mesh, workdir: str, reporter: Reporter):
        self._spec, self._reporter = experiment.train, reporter
        self._experiment, self._workdir = experiment, epath.Path(workdir)
        self._mesh = mesh
        self._folder = self._workdir / "samples"
        self._sample = experiment.task.preview(mesh)
        if self._spec.eval_every:
            draw = make_preview(experiment.task.model, mesh, seed=experiment.seed, num=EVALUATED)
            self._evaluate = SmallEvaluation(draw, mesh, experiment.data, num=EVALUATED)
            if jax.process_index() == 0:
                self._table = ResultsTable(self._workdir / "evaluation" / "while_training.json")

    def __call__(self, step: int, state: TrainState) -> None:
        last, every = step == self._spec.steps, self._spec
        show = last or (every.sample_every and step % every.sample_every == 0)
        evaluate = every.eval_every and (last or step % every.eval_every == 0)
        if not show and not evaluate:
            return
        jax.block_until_ready(state)  # the time of steps that still run counts as training
        ema = gathered(state.ema, self._mesh)
        with self._reporter.progress.paused():
            if show:
                self._show(step, images.grid(self._sample(ema, state.task_state)))
            if evaluate:
                figures = self._evaluate(ema, state.task_state["frozen"])
                self._reporter.scalars(step, figures)
                self._record(step, figures)

    def _record(self, step: int, figures: dict[str, float]) -> None:
        """Adds the figures of a step, with all that they depend on, to a table in the workdir."""
        if jax.process_index():
            return
        experiment = self._experiment
        average = restore.plain_average(experiment.train.ema_decay)
        settings = record.settings_of(
            {"workdir": str(absolute(self._workdir)), "step": step, "average": average},
            experiment.task.model.sampling,
            seed=experiment.seed,
            num=EVALUATED,
        )
        found = {name.removeprefix("eval/"): Figure(value) for name, value in figures.items()}
        self._table.add(settings | self._evaluate.settings, found)

    def _show(self, step: int, grid: np.ndarray) -> None:
        """Writes a grid to a file and to the logs."""
        if jax.process_index() == 0:
            path = self._folder / f"step_{step:07}.png"
            images.write_png(path, grid)
            self._reporter.image(step, "samples", grid)
            logging.info("sample grid: %s", path)
