"""Tests of captions beside the images of a folder, in the forms in which people have them."""

import csv
import json

import pytest
from test_folders import opened, warnings, write  # noqa: F401

from conprediff_jax import data

NAMES = ["a.png", "b.png", "sub/c.png", "é ü.png"]
CAPTIONS = {"a.png": "a cat", "sub/c.png": 'two "dogs", 1990', "e\u0301 ü.png": "Ünïcode"}


def texts(root, **fields):
    source = opened(root, text="text", **{"label": None, **fields})
    return {file: source[i]["text"] for i, file in enumerate(source.files)}


def write_jsonl(path, rows):
    path.write_bytes("\ufeff".encode() + "\r\n".join(map(json.dumps, rows)).encode() + b"\r\n")


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        out = csv.DictWriter(file, list(rows[0]))
        out.writeheader()
        out.writerows(rows)


def write_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("write_rows", [write_jsonl, write_csv, write_parquet])
def test_metadata_are_matched_counted_and_named(tmp_path, warnings, write_rows):  # noqa: F811
    write(tmp_path, *NAMES)
    rows = [{"file_name": name, "text": text, "size": 7} for name, text in CAPTIONS.items()]
    rows += [{"file_name": "../a.png", "text": "outside", "size": 7}]
    name = f"metadata.{write_rows.__name__.removeprefix('write_')}"
    write_rows(tmp_path / name, rows)
    found = texts(tmp_path, keep=["size"])
    assert found == dict(zip(NAMES, ["a cat", "", 'two "dogs", 1990', "Ünïcode"], strict=True))
    assert opened(tmp_path, text="text", keep=["size"], label=None)[0]["size"] == "7"
    assert [line.partition(f"{tmp_path}/{name}: ")[2] for line in warnings] == [
        f"1 rows name no image, such as ../a.png ({'row' if 'parquet' in name else 'line'} "
        f"{4 + ('csv' in name)})",
        "1 of 4 images have no size, such as b.png; it is empty for them",
        "1 of 4 images have no text, such as b.png; it is empty for them",
    ]
    with pytest.raises(data.DataError, match=rf"no feature prompt; .*{name} has text, size"):
        opened(tmp_path, text="prompt")


def test_a_broken_row_is_left_out(tmp_path, warnings):  # noqa: F811
    write(tmp_path, "a.png", "b\n.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": ["one", "two"]}\n{"file_name": \n\n7\n'
        '{"file_name": "a.png", "text": "three"}\n{"file_name": "x\\ny.png"}\n'
    )
    assert texts(tmp_path) == {"a.png": ["one", "two", "three"], "b\n.png": ""}
    assert "left out 2 rows, such as line 2 (Expecting value" in warnings[0]
    assert warnings[1].endswith(r"1 rows name no image, such as x\ny.png (line 6)")
    assert all("\n" not in line for line in warnings)
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(data.DataError, match=r"has metadata.jsonl and metadata.csv; keep one"):
        texts(tmp_path)


def test_metadata_lie_in_a_split_or_above_it(tmp_path):
    write(tmp_path, "train/1.png", "test/1.png")
    rows = [
        {"file_name": f"{name}/1.png", "text": name, "kind": name} for name in ("train", "test")
    ]
    write_csv(tmp_path / "metadata.csv", rows)
    assert texts(tmp_path) == {"1.png": "train"}
    assert texts(tmp_path, split="test") == {"1.png": "test"}
    write_csv(tmp_path / "test" / "metadata.csv", [{"file_name": "1.png", "text": "nearer"}])
    assert texts(tmp_path, split="test") == {"1.png": "nearer"}


def test_text_files_beside_the_images(tmp_path, warnings):  # noqa: F811
    write(tmp_path, "a.png", "a.jpg", "b/a.png", "c.png")
    (tmp_path / "a.TXT").write_bytes("\ufeffcafé\r\n\r\n au lait \r\n".encode("utf-16"))
    (tmp_path / "b" / "a.txt").write_bytes("naïve “quotes”".encode("cp1252"))
    (tmp_path / "notes.txt").write_text("of no image")
    assert texts(tmp_path) == {
        "a.jpg": ["café", "au lait"],
        "a.png": ["café", "au lait"],
        "b/a.png": "naïve “quotes”",
        "c.png": "",
    }
    assert opened(tmp_path, text="text", label=None)[2]["notes"] == ["caption read as windows-1252"]
    assert warnings == [
        f"{tmp_path}: 1 images share the caption of another one of the same stem",
        f"{tmp_path}: 1 text files lie beside no image, such as notes.txt",
        f"{tmp_path}: 1 of 4 images have no text, such as c.png; it is empty for them",
    ]


def test_captions_arrive_in_batches(tmp_path):
    write(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("one\ntwo")
    spec = data.DataSpec(name=str(tmp_path), image_size=8, threads=0, text="text")
    batches = data.make_iterator(spec, batch_size=20, seed=0)
    assert set(next(batches)["text"]) == {"one", "two", ""}


def test_captions_of_coco(tmp_path, warnings):  # noqa: F811
    write(tmp_path, "train2017/000.jpg", "train2017/001.jpg")
    notes = [{"image_id": 7, "caption": "one\n"}, {"image_id": 7, "caption": "two"},
             {"image_id": 9, "caption": "nowhere"}]  # fmt: skip
    stored = {"images": [{"id": 7, "file_name": "001.jpg"}], "annotations": notes}
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train2017.json").write_text(json.dumps(stored))
    whole = {"train2017/000.jpg": "", "train2017/001.jpg": ["one", "two"]}
    assert texts(tmp_path) == whole
    assert texts(tmp_path / "train2017") == texts(tmp_path, split="train2017")
    assert list(texts(tmp_path / "train2017").values()) == list(whole.values())
    assert "1 rows name no image, such as None (image 9)" in warnings[0]


def test_classes_come_from_names_and_columns(tmp_path, warnings):  # noqa: F811
    write(tmp_path, "train/cat_1.png", "train/dog_2.png", "test/dog_1.png", "other/3.png")
    source = opened(tmp_path, label="prefix", split="test")
    assert source.class_names == ("cat", "dog") and source.labels == (1,)
    assert "left out are other. If test is a class" in warnings[0]
    rows = [{"file_name": "cat_1.png", "kind": 3}, {"file_name": "dog_2.png", "kind": "3"}]
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows)
    source = opened(tmp_path, label="kind")
    assert source.class_names == ("3",) and source.labels == (0, 0)
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows[:1])
    with pytest.raises(data.DataError, match=r"1 images do not have one kind each, such as dog_2"):
        opened(tmp_path, label="kind")
