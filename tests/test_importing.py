"""Tests of `prepare --from`: every format becomes the same records, and a report says the rest."""

import io
import json
import pathlib
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from test_commands import run

from conprediff_jax import data
from conprediff_jax.common.errors import DataError, FieldError
from conprediff_jax.data import transforms
from conprediff_jax.data.importing import beam, counting, page, writing
from conprediff_jax.data.importing.formats import plan_import
from conprediff_jax.data.importing.parts import Wanted

COUNT = 12
CLASSES = ("cat", "dog")


def picture(value, size=(20, 16), kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (*size[::-1], 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode) if mode != "I;16" else Image.new(mode, size, 9)
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = [picture(i) for i in range(COUNT)]
TEXTS = [[f"number {i}"] * (i % 3 > 0) + ["ünï"] * (i % 3 > 1) for i in range(COUNT)]
LABELS = [i % 2 for i in range(COUNT)]


def make_folder(root):
    rows = []
    for i, image in enumerate(IMAGES):
        file = root / CLASSES[LABELS[i]] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
        name = f"{CLASSES[LABELS[i]]}/{i:02}.png"
        rows.append(json.dumps({"file_name": name, "text": TEXTS[i]}))
    (root / "metadata.jsonl").write_text("\n".join(rows))
    return root


def make_tars(root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard:05}.tar", "w") as archive:
            for i in range(shard, COUNT, 2):
                meta = json.dumps({"caption": TEXTS[i]}).encode()
                for kind, content in {
                    "json": meta, "PNG": IMAGES[i], "cls": f"{LABELS[i]}\n".encode(),
                }.items():  # fmt: skip
                    info = tarfile.TarInfo(f"./a.b/{i:03}.{kind}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return root


def table():
    """As the library `datasets` writes it."""
    images = [{"bytes": image, "path": None} for image in IMAGES]
    features = {"img": {"_type": "Image"}, "fine": {"_type": "ClassLabel", "names": CLASSES}}
    made = pa.table({"fine": LABELS, "img": images, "caption": TEXTS})
    told = json.dumps({"info": {"features": features}})
    return made.replace_schema_metadata({"huggingface": told})


def make_parquet(root):
    root.mkdir()
    pa.parquet.write_table(table(), root / "train-00000-of-00001.parquet", row_group_size=5)
    return root


def make_arrow(root):
    folder = root / "train"
    folder.mkdir(parents=True)
    with pa.ipc.new_stream(str(folder / "data-0.arrow"), table().schema) as out:
        out.write_table(table())
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (root / "dataset_dict.json").write_text('{"splits": ["train"]}')
    return root


def imported(source, out, wanted=None, **options):
    plan = plan_import(str(source), wanted or Wanted())
    return writing.write(plan, str(source), str(out), writing.Options(threads=2, **options))


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in pathlib.Path(folder).iterdir()
        if path.name != "lock.json"
    }


def records(out, **fields):
    source = data.open_data(data.DataSpec(name=str(out), image_size=8, **fields))
    return [source[i] for i in range(len(source))], source.class_names


@pytest.mark.parametrize("make", [make_folder, make_tars, make_parquet, make_arrow])
def test_every_format_becomes_the_same_records(tmp_path, make):
    report = imported(make(tmp_path / "in"), tmp_path / "out")
    found, names = records(tmp_path / "out", text="text")
    assert names == (CLASSES if make is not make_tars else ("0", "1"))
    got = {record["image"]: (record["label"], record["text"]) for record in found}
    assert got == dict(zip(IMAGES, zip(LABELS, TEXTS, strict=True), strict=True))
    shard = next((tmp_path / "out").glob("*.array_record*"))
    for raw in ArrayRecordDataSource([str(shard)]):  # the same in every process
        assert tf_example_pb2.Example.FromString(raw).SerializeToString(deterministic=True) == raw
    assert report["splits"] == {"train": COUNT} and not report["left_out"]
    assert report["caption_words"] == {"2": 8, "1": 4, "none": 4}


def test_arrays_become_images_without_loss(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (5, 16, 20, 3), np.uint8)
    for save, name in ((np.savez, "a.npz"), (np.savez_compressed, "b.npz")):
        save(tmp_path / name, arrays, np.arange(5) % 3)
        imported(tmp_path / name, tmp_path / name[0])
        found, names = records(tmp_path / name[0])
        pixels = [np.asarray(Image.open(io.BytesIO(record["image"]))) for record in found]
        assert (np.stack(pixels) == arrays).all() and names == ("0", "1", "2")
        assert [record["label"] for record in found] == [0, 1, 2, 0, 1]


def test_an_interrupted_import_ends_with_the_same_bytes(tmp_path, monkeypatch):
    source = make_parquet(tmp_path / "in")
    monkeypatch.setattr("conprediff_jax.data.importing.tables._PART", 3)
    options = {"held_out": 0.4}
    whole = imported(source, tmp_path / "whole" / "x", **options)
    inspect, count = writing.inspect, 0

    def stops(*args):
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return inspect(*args)

    monkeypatch.setattr(writing, "inspect", stops)
    with pytest.raises(KeyboardInterrupt):
        imported(source, tmp_path / "again" / "x", **options)
    with pytest.raises(DataError, match="an import of other data, by its held_out"):
        imported(source, tmp_path / "again" / "x", held_out=0.5)
    count = -100
    imported(source, tmp_path / "again" / "x", **options)
    assert count == -100 + COUNT - 5  # the first part was done
    assert contents(tmp_path / "again" / "x") == contents(tmp_path / "whole" / "x")
    assert set(whole["splits"]) == {"train", "test"} and sum(whole["splits"].values()) == COUNT
    assert imported(source, tmp_path / "whole" / "x", **options) == whole


def test_equal_images_are_named_and_left_out_on_request(tmp_path):
    make_folder(tmp_path / "in")
    for i in range(3):
        (tmp_path / "in" / "cat" / f"z{i}.png").write_bytes(IMAGES[0])
    kept = imported(tmp_path / "in", tmp_path / "kept", held_out=0.3)
    assert kept["duplicates"][0]["count"] == 3
    sides = [
        IMAGES[0] in [record["image"] for record in records(tmp_path / "kept", split=split)[0]]
        for split in ("train", "test")
    ]
    assert sum(sides) == 1  # all on one side
    report = imported(tmp_path / "in", tmp_path / "dropped", drop_duplicates=True)
    assert report["splits"] == {"train": COUNT}
    assert sorted(r["image"] for r in records(tmp_path / "dropped")[0]) == sorted(IMAGES)


IN_MEMORY = "--direct_running_mode=in_memory --direct_num_workers=1"


def run_beam(source, out, options=IN_MEMORY, runner="DirectRunner"):
    plan = plan_import(str(source), Wanted())
    by = beam.Beam(runner, options)
    chosen = writing.Options(held_out=0.4, drop_duplicates=True, threads=2)
    return writing.write(plan, str(source), str(out), chosen, by)


@pytest.fixture
def in_parts(monkeypatch):
    """Parts of few images, Apache Beam, and nothing that was logged before."""
    monkeypatch.setattr("conprediff_jax.common.images._warned", {})
    pytest.importorskip("apache_beam", reason='pip install -e ".[beam]" moves protobuf')
    for module in ("archives", "folders", "tables"):
        monkeypatch.setattr(f"conprediff_jax.data.importing.{module}._PART", 3)


@pytest.mark.parametrize("make", [make_folder, make_tars, make_parquet, make_arrow])
def test_beam_writes_the_same_bytes(tmp_path, in_parts, make):
    source = make(tmp_path / "in")
    if make is make_folder:
        (source / "cat" / "again.png").write_bytes(IMAGES[3])
        (source / "dog" / "empty.png").write_bytes(b"")
    plain = imported(source, tmp_path / "plain" / "x", held_out=0.4, drop_duplicates=True)
    assert len(plain["splits"]) == 2 and len(plain["left_out"]) == (make is make_folder)
    assert run_beam(source, tmp_path / "beam" / "x") == plain
    assert contents(tmp_path / "beam" / "x") == contents(tmp_path / "plain" / "x")


def test_workers_of_beam_go_on_with_an_import(tmp_path, in_parts, monkeypatch):
    source, out = make_tars(tmp_path / "in"), tmp_path / "again" / "x"
    plain = imported(source, tmp_path / "plain" / "x", held_out=0.4, drop_duplicates=True)
    write_part = writing.write_part

    def stops(plan, number, *others):
        if number == 1:
            raise KeyboardInterrupt
        write_part(plan, number, *others)

    monkeypatch.setattr(writing, "write_part", stops)
    with pytest.raises(KeyboardInterrupt):
        imported(source, out, held_out=0.4, drop_duplicates=True)
    assert {path.name for path in out.glob("unfinished/*.json")} == {"plan.json", "00000.json"}
    done = run(
        "prepare", f"--from={source}", f"--out={out}", "--held_out=0.4", "--drop_duplicates",
        "--runner=DirectRunner", "--beam_options=--direct_num_workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"imported from {source}: {plain['splits']['test']} test, ")
    page = {"index.html", "contact_sheet.png"}
    written = {name: file for name, file in contents(out).items() if name not in page}
    assert written == contents(tmp_path / "plain" / "x")


def test_what_is_wrong_with_a_pipeline_is_one_line(tmp_path, in_parts):
    make_tars(tmp_path / "in")
    (tmp_path / "in" / "00002.tar").write_bytes(b"no archive")
    for _ in range(2):
        with pytest.raises(DataError, match=r"00002\.tar: not a tar file"):
            run_beam(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "00002.tar").unlink()
    with pytest.raises(FieldError, match=r"^beam_options is '--direct_num_workers=two': argument"):
        run_beam(tmp_path / "in", tmp_path / "other", "--direct_num_workers=two")
    with pytest.raises(FieldError, match=r"^runner is Nobody: "):
        run_beam(tmp_path / "in", tmp_path / "third", runner="Nobody")


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def frames(kind):
    images = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


def indexed():
    file = io.BytesIO()
    Image.new("P", (20, 20)).save(file, "PNG", transparency=0)
    return file.getvalue()


ODD = {  # files, and what the report says of them
    "empty.png": (b"", "left out: the file is empty"),
    "text.jpg": (b"<html>not found</html>", "left out: not a known kind of image"),
    "cut.png": (IMAGES[0][:-30], "left out: damaged or truncated"),
    "one.png": (picture(1, (1, 1)), "left out: the shorter side is below 16 pixels (min_side)"),
    "long.png": (picture(1, (400, 20)), "left out: the longer side is above 10 times the shorter"),
    "bomb.png": (
        picture(1, (100, 100)),
        "left out: above Pillow's limit against bombs, 2 x MAX_IMA",
    ),
    "jpeg.png": (picture(2, kind="JPEG"), "named .png, but the file is JPEG"),
    "-cmyk\n.jpg": (picture(3, kind="JPEG", mode="CMYK"), "CMYK, converted without its colour"),
    "deep.png": (picture(4, mode="I;16"), "16 bits a sample, of which 8 are used"),
    "grey.png": (picture(5, mode="LA"), "an alpha channel: what is transparent becomes white"),
    "palette.png": (indexed(), "a palette with transparency, which becomes white"),
    "moves.gif": (frames("GIF"), "an animation, of which the first frame is used"),
    "turned.jpg": (picture(6, kind="JPEG", exif=exif(6)), "turned upright by its EXIF orientation"),
    "exif.jpg": (picture(7, kind="JPEG", exif=exif(99)), "EXIF with an orientation that does not"),
    "Ünï 図.webp": (picture(8, kind="WEBP"), ""),
}


def test_odd_files_are_counted_named_and_never_end_an_import(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_500)
    root = tmp_path / "in"
    root.mkdir()
    for name, (content, _) in ODD.items():
        (root / name).write_bytes(content)
    (root / "nowhere.png").symlink_to(tmp_path / "absent")
    report = imported(root, tmp_path / "out")
    left_out = {entry["reason"]: entry for entry in report["left_out"]}
    noted = {entry["reason"]: entry for entry in report["notes"]}
    assert len(left_out) == 7 and sum(entry["count"] for entry in left_out.values()) == 7
    assert report["splits"] == {"train": len(ODD) - 6} and len(noted) == 8
    for name, (_, expected) in ODD.items():
        entries = left_out if expected.startswith("left out: ") else noted
        expected = expected.removeprefix("left out: ")
        found = [entry for reason, entry in entries.items() if reason.startswith(expected)]
        assert not expected or name.replace("\n", r"\n") in found[0]["such_as"][0]
    assert "No such file or directory" in left_out
    assert not any("\n" in line for line in counting.lines(report))
    for record in records(tmp_path / "out")[0]:
        transforms.decode(record["image"])


def test_large_images_are_reduced_on_request(tmp_path):
    (tmp_path / "in").mkdir()
    whole = picture(0, (80, 64), kind="JPEG")
    (tmp_path / "in" / "a.jpg").write_bytes(whole)
    (tmp_path / "in" / "b.png").write_bytes(picture(1, (64, 96), mode="LA"))
    (tmp_path / "in" / "c.png").write_bytes(IMAGES[0])
    imported(tmp_path / "in", tmp_path / "out", size=32)
    photo, clear, small = (
        Image.open(io.BytesIO(record["image"])) for record in records(tmp_path / "out")[0]
    )
    assert (photo.format, photo.size, photo.mode) == ("JPEG", (40, 32), "RGB")
    assert (clear.format, clear.size, clear.mode) == ("PNG", (32, 48), "RGBA")
    assert small.size == (20, 16)
    halved = Image.open(io.BytesIO(whole)).reduce(2)
    assert np.abs(np.asarray(photo).astype(int) - np.asarray(halved)).mean() < 8


def test_a_page_shows_data(tmp_path):
    make_folder(tmp_path / "in")
    (tmp_path / "in" / "cat" / "bad.png").write_bytes(b"")
    spec = data.DataSpec(name=str(tmp_path / "in"), image_size=8, text="text")
    shown = page.write_page(data.open_data(spec), "<in>", tmp_path / "page", "text").read_text()
    assert "&lt;in&gt;" in shown and "13 images" in shown and "bad.png: the file is empty" in shown
    assert "landscape<td>12" in shown and "number<td>8" in shown and "cat<td>6" in shown
    with Image.open(tmp_path / "page" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 200


def test_nothing_to_import_is_one_line(tmp_path):
    with pytest.raises(DataError, match="there is nothing there that can be imported"):
        plan_import(str(tmp_path / "absent"), Wanted())
    with pytest.raises(DataError, match="no images there"):
        plan_import(str(tmp_path), Wanted())
    (tmp_path / "a.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a tar file"):
        plan_import(str(tmp_path / "*.tar"), Wanted())
    make_parquet(tmp_path / "in")
    with pytest.raises(DataError, match="has no column prompt, but fine, img, caption"):
        plan_import(str(tmp_path / "in"), Wanted(text="prompt"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(DataError, match=r"holds other things \(mine.txt\)"):
        imported(tmp_path / "in", tmp_path / "out")
