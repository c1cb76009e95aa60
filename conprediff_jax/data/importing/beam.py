"""Imports on many cores or machines: an Apache Beam pipeline that writes the parts of an import.

    numbers of the parts that are not done -> spread over the workers -> `writing.write_part`

A worker reads, inspects and writes a part by the same function as an import without Beam, and the
process that started the pipeline joins what they wrote. So the files are the same, byte for byte,
whatever the runner and the number of workers, and an import that one runner has begun, another one
goes on with. Images do not leave the worker that read them; TFDS's own `BeamWriter` would send each
of them to another one, sorted by its key. What TFDS does here is what it does without Beam, the
features and their serialization; the counter `parts` shows on a runner's page.

All workers read the source and write to the folder under the same paths: in a bucket, or on a file
system that they share.
"""

import contextlib
import dataclasses
import functools
import io
import shlex
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from conprediff_jax.common import buckets, extras
from conprediff_jax.common.errors import DataError, FieldError, UserError, first_line
from conprediff_jax.common.files import absolute, write_text
from conprediff_jax.common.progress import ProgressLine
from conprediff_jax.data.importing import writing
from conprediff_jax.data.importing.parts import Plan

DIRECT = "DirectRunner"
_ON_ALL_CORES = ("--direct_running_mode=multi_processing", "--direct_num_workers=0")
_QUIETLY = ("--default_sdk_harness_log_level=WARNING",)
_LOOK_EVERY = 2.0  # seconds between two looks at which parts are done


@dataclasses.dataclass(frozen=True)
class Beam:
    """Writes the parts of an import as a Beam pipeline; it can be given to `writing.write`.

    Attributes:
        runner: Name of the runner, such as `DirectRunner`, `DataflowRunner` or `FlinkRunner`.
        options: Beam's own flags, as on a command line. DirectRunner has a process for each core
            unless they say otherwise.
    """

    runner: str
    options: str = ""

    def __call__(self, plan: Plan, aside: epath.Path, options: writing.Options) -> None:
        """Writes all parts that are not done; the arguments are those of `writing.write_part`.

        Raises:
            DataError: A part cannot be read, or the pipeline failed.
            FieldError: There is no such runner, or an option is wrong.
            UserError: Apache Beam is not installed.
        """
        beam = extras.apache_beam()
        extras.tensorflow_datasets()
        if not (lacking := _lacking(plan, aside)):
            return
        for number in lacking:
            _reason(aside, number).unlink(missing_ok=True)
        pipeline = self._pipeline(beam)
        work = functools.partial(
            _write_part, plan=plan, aside=str(absolute(aside)), options=options
        )
        _ = (
            pipeline
            | "Parts" >> beam.Create(lacking)
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(work)
        )
        with _watched(plan, aside):
            failure = self._failure(pipeline)
        if lacking := _lacking(plan, aside):
            reasons = [_reason(aside, n).read_text() for n in lacking if _reason(aside, n).exists()]
            silent = f"{self.runner} ended without part {lacking[0]}: do all workers see {aside}?"
            raise DataError((reasons or [failure])[0] or silent)

    def _pipeline(self, beam: Any) -> Any:
        """An empty `beam.Pipeline` with the runner and the options."""
        from apache_beam.options.pipeline_options import PipelineOptions

        try:
            given = shlex.split(self.options)
        except ValueError as error:  # a quotation mark stands alone
            raise FieldError("beam_options", f"is {self.options!r}: {error}") from error
        flags = [*_QUIETLY, *(_ON_ALL_CORES if self.runner == DIRECT else ()), *given]
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options = PipelineOptions([f"--runner={self.runner}", *flags])
                options.get_all_options()  # reads the values, which else waits for the run
                pipeline = beam.Pipeline(options=options)
        except SystemExit as error:  # argparse, which has printed its usage before
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise FieldError("beam_options", f"is {self.options!r}: {reason}") from error
        except (ValueError, ImportError, AttributeError) as error:
            raise FieldError("runner", f"is {self.runner}: {first_line(error)}") from error
        return pipeline

    def _failure(self, pipeline: Any) -> str:
        """Runs a pipeline to its end, and returns why it failed; '' if it did not."""
        try:
            pipeline.run().wait_until_finish()
        except Exception as error:  # of grpc, or of the service of a runner
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return f"{self.runner}: {(lines or [type(error).__name__])[-1]}"
        return ""


def _write_part(number: int, plan: Plan, aside: str, options: writing.Options) -> None:
    """Writes a part in a worker; what a user can correct is left beside it for the last line."""
    count = extras.tensorflow_datasets().beam.inc_counter
    try:
        writing.write_part(plan, number, epath.Path(aside), options)
    except UserError as error:
        write_text(_reason(epath.Path(aside), number), str(error))
        return
    count("parts", 1)


def _reason(aside: epath.Path, number: int) -> epath.Path:
    """The file that says why a part could not be written."""
    return aside / f"{number:05}.failed"


def _lacking(plan: Plan, aside: epath.Path) -> Sequence[int]:
    """The numbers of the parts that are not done."""
    is_bucket = buckets.is_bucket(aside)  # which is asked anew, since others write there
    there = buckets.listed(str(aside)) if is_bucket else {path.name for path in aside.iterdir()}
    numbers = range(len(plan.parts))
    return [n for n in numbers if writing.counts_of(aside, n).name not in there]


@contextlib.contextmanager
def _watched(plan: Plan, aside: epath.Path) -> Iterator[None]:
    """Encloses a pipeline, and logs now and then how many parts are done."""
    total, ended = len(plan.parts), threading.Event()
    line, lacking = ProgressLine(total, "parts"), len(_lacking(plan, aside))
    line.skip(total - lacking)

    def look() -> None:
        before, last = lacking, False
        while before and not last:
            last = ended.wait(_LOOK_EVERY)
            now = len(_lacking(plan, aside))
            if now < before:
                line.add(before - now)
            before = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
