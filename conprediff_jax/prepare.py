"""Makes a data set that is read at random: imported, from TFDS or computed; and shows data.

    python -m conprediff_jax.prepare --from=photos --out=data/photos --held_out=0.05
    python -m conprediff_jax.prepare --from='shards/*.tar' --text=txt --out=data/web
    python -m conprediff_jax.prepare --from='shards/*.tar' --out=data/web --runner=DirectRunner
    python -m conprediff_jax.prepare --name=cifar10 --data_dir=data
    python -m conprediff_jax.prepare --name=dead_leaves/32 --num=100000 --seed=1

--from takes a folder of images with captions beside them, WebDataset's .tar files, Parquet files,
an .npz of ADM's layout, or a folder that Hugging Face's datasets.save_to_disk wrote. The report in
OUT says what was imported, what was left out and why. An interrupted import goes on where it
stopped. --runner runs it as a pipeline of Apache Beam, on all cores or on a cluster; the files are
the same. --config.data.name=./OUT trains on the result. --show=DATA --out=FOLDER writes a page that
shows data of any kind: a contact sheet, sizes, brightness and the words of captions.

Two kinds of data are computed, as many images as you ask for: `dead_leaves`, opaque discs of all
sizes, and `potts`, grids of tokens whose clusters have all sizes. What neighbouring pixels or
tokens do in them is known, see `benchmarks/known_structure.py`.
"""

from absl import flags

from conprediff_jax.cli import help

_NAME = flags.DEFINE_string(
    "name", None, "Prepare the data set of this name, such as openmoji/people."
)
_NUM = flags.DEFINE_integer(
    "num", None, "Compute this many images for the split train; the default is 65,536."
)
_TEST_NUM = flags.DEFINE_integer(
    "test_num", None, "Compute this many images for the split test; the default is 4,096."
)
_SEED = flags.DEFINE_integer(
    "seed", None, "This seed decides the computed images; the default is 0."
)
_FROM = flags.DEFINE_string(
    "from", None, "Import this folder, file or pattern of files; the format is recognized."
)
_SHOW = flags.DEFINE_string(
    "show", None, "Write a page that shows these data: a TFDS name or a path, as config.data.name."
)
_OUT = flags.DEFINE_string("out", None, "Write to this folder, with --from and --show.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "Write the data set to this folder; the default is TFDS_DATA_DIR or ~/tensorflow_datasets.",
)
_MANUAL_DIR = flags.DEFINE_string(
    "manual_dir",
    None,
    "Find files that you must download yourself in this folder; the default is "
    "DATA_DIR/downloads/manual.",
)
_TEXT = flags.DEFINE_string(
    "text", "", "Take captions from this column or kind of file; 'none' for no captions. By "
    "default they are found."
)  # fmt: skip
_LABEL = flags.DEFINE_string(
    "label", "", "Take classes from this column or kind of file, 'label' for subfolders, 'prefix' "
    "for what stands before the first _ of a file's name, 'none' for no classes. By default they "
    "are found."
)  # fmt: skip
_KEEP = flags.DEFINE_list("keep", [], "Import these further columns, as texts.")
_SPLIT = flags.DEFINE_string("split", "train", "Show this split.")
_HELD_OUT = flags.DEFINE_float(
    "held_out", 0.0, "Hold out this share of the split train as the split test, by a hash.",
    lower_bound=0.0, upper_bound=0.9,
)  # fmt: skip
_SIZE = flags.DEFINE_integer(
    "size", 0, "Reduce images until their shorter side has this many pixels, which training reads "
    "faster; 0 keeps them as they are.", lower_bound=0,
)  # fmt: skip
_DROP = flags.DEFINE_bool(
    "drop_duplicates", False, "Leave out images whose bytes are those of an image before."
)
_MIN_SIDE = flags.DEFINE_integer(
    "min_side", 16, "Leave out images whose shorter side has fewer pixels.", lower_bound=1
)
_MAX_ASPECT = flags.DEFINE_float(
    "max_aspect", 10.0, "Leave out images that are longer than this many times their shorter side.",
    lower_bound=1.0,
)  # fmt: skip
_RUNNER = flags.DEFINE_string(
    "runner", None, "Import by this runner of Apache Beam, on several cores or machines: "
    "DirectRunner (here), DataflowRunner, FlinkRunner, SparkRunner or PrismRunner."
)  # fmt: skip
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", "", "Beam's own flags for the runner, such as '--direct_num_workers=4' or "
    "'--flink_master=host:8081 --parallelism=64'."
)  # fmt: skip

help.answer(__name__)  # before imports that take seconds

from conprediff_jax.cli import app
from conprediff_jax.common import opening
from conprediff_jax.common.errors import DataError, FieldError
from conprediff_jax.common.files import check_folder, is_address
from conprediff_jax.data import made, sources
from conprediff_jax.data.importing import beam, counting, page, writing
from conprediff_jax.data.importing.formats import plan_import
from conprediff_jax.data.importing.inspecting import Limits
from conprediff_jax.data.importing.parts import Wanted
from conprediff_jax.data.tfds import default_data_dir, make_builder, prepare

_ON_PAGE = "caption", "text"  # features that may hold captions


def main(argv: list[str]) -> None:
    """Imports, prepares or shows data, and says where the result is."""
    del argv
    given = [name for name in ("from", "name", "show") if flags.FLAGS[name].value]
    if len(given) != 1:
        raise FieldError("from", "or --name or --show is needed, and only one of them")
    for flag in (_RUNNER, _BEAM_OPTIONS):
        if flag.value and given[0] != "from":
            raise FieldError(flag.name, f"is for --from, not for --{given[0]}")
    if _BEAM_OPTIONS.value and not _RUNNER.value:
        raise FieldError("beam_options", "is for a runner of Beam; give --runner as well")
    if given[0] == "name":
        _prepare()
        return
    if not _OUT.value:
        raise FieldError("out", f"is needed with --{given[0]}: the folder to write to")
    check_folder(_OUT.value, "--out", local=given[0] == "show")
    if given[0] == "show":
        print(_show(_SHOW.value, _SPLIT.value, _OUT.value))
    else:
        _import()


def _prepare() -> None:
    """Computes a data set, or downloads one of TFDS, and writes it as array_record."""
    name, where = _NAME.value, _DATA_DIR.value or default_data_dir()
    check_folder(where, "--data_dir", local=True)
    asked = {"num": _NUM.value, "test_num": _TEST_NUM.value, "seed": _SEED.value}
    asked = {field: value for field, value in asked.items() if value is not None}
    if made.is_made(name):
        reads = made.law_of(name).description
        opening.say(reads, "a data set with random access", made.folder_of(name, where), on=None)
        made.write(name, where, **asked)
        builder = make_builder(name, where)
    else:
        for field, value in asked.items():
            raise FieldError(field, f"is {value}: it is for data that are computed")
        opening.say(f"the files of {name}", "a data set with random access", where, on=None)
        builder = prepare(name, _DATA_DIR.value, _MANUAL_DIR.value)
    splits = ", ".join(
        f"{info.num_examples:,} {split}" for split, info in builder.info.splits.items()
    )
    print(f"{name}: {splits}; in {builder.data_dir}")


def _import() -> None:
    """Imports data of another format."""
    text, label = (None if flag.value == "none" else flag.value for flag in (_TEXT, _LABEL))
    wanted = Wanted(text=text, label=label, keep=tuple(_KEEP.value))
    plan = plan_import(_FROM.value, wanted)
    found = [f"captions ({plan.text})"] if plan.text else []
    found += [f"classes ({plan.label})"] if plan.label else []
    what = f"{plan.format}: images{''.join(f', {name}' for name in [*found, *plan.keep])}"
    opening.say(f"{_FROM.value}, {what}", "a data set with random access", _OUT.value, on=None)
    options = writing.Options(
        held_out=_HELD_OUT.value,
        drop_duplicates=_DROP.value,
        size=_SIZE.value,
        limits=Limits(min_side=_MIN_SIDE.value, max_aspect=_MAX_ASPECT.value),
    )
    by = beam.Beam(_RUNNER.value, _BEAM_OPTIONS.value) if _RUNNER.value else None
    report = writing.write(plan, _FROM.value, _OUT.value, options, by)
    said = counting.lines(report)
    print("\n".join(said))
    if is_address(_OUT.value):
        print(f"python -m conprediff_jax.prepare --show={_OUT.value} --out=FOLDER shows it")
        return
    split = max(report["splits"], key=report["splits"].get)
    print(_show(_OUT.value, split, _OUT.value, said))


def _show(name: str, split: str, out: str, report: list[str] = ()) -> str:
    """Writes the page of some data, and returns a line that says where it is."""
    for keep in (*([_TEXT.value] if _TEXT.value not in ("", "none") else []), *_ON_PAGE, None):
        try:
            source = sources.open_source(
                name, split=split, data_dir=_DATA_DIR.value, keep=[keep] if keep else []
            )
            break
        except DataError:
            if keep is None:
                raise
    shown = page.write_page(source, f"{name}, split {split}", out, keep, report)
    return f"{shown} shows {name}"


if __name__ == "__main__":
    app.run(main, again="the same command continues where it stopped")
