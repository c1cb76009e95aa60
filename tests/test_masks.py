"""Tests of the masks of inpainting and of mask files."""

import numpy as np
import pytest
from PIL import Image

from conprediff_jax.common.errors import UserError
from conprediff_jax.data import masks
from conprediff_jax.data.holes import Picture, are_files, cut, mask_files, read_data, read_files
from conprediff_jax.data.masks import FREE_FORMS, MASKS, filled_share, make_mask, read_mask
from conprediff_jax.data.pipeline import DataSpec


def draw(name, seed=0, height=256, width=256):
    return make_mask(name, height, width, np.random.default_rng(seed))


def test_fixed_masks_keep_what_the_protocol_says():
    rows, columns = np.mgrid[:256, :256]
    centre = np.abs(rows - 127.5) < 32
    expected = {
        "every_second_line": rows % 2 == 0,
        "super_resolve": (rows % 2 == 0) & (columns % 2 == 0),
        "expand": centre & centre.T,  # 64 x 64
        "half": columns < 128,
        "box": ~((np.abs(rows - 127.5) < 64) & (np.abs(columns - 127.5) < 64)),
    }
    assert set(expected) == set(masks.FIXED)
    for name, mask in expected.items():
        np.testing.assert_array_equal(draw(name), mask)
    shares = [filled_share(mask) for mask in expected.values()]
    np.testing.assert_allclose(shares, [0.5, 0.75, 1 - 1 / 16, 0.5, 0.25])


@pytest.mark.parametrize("name", FREE_FORMS)
def test_free_form_masks_are_seeded_and_fill_a_part(name):
    drawn = [draw(name, seed, 64, 48) for seed in range(20)]
    np.testing.assert_array_equal(drawn[3], draw(name, 3, 64, 48))
    shares = [filled_share(mask) for mask in drawn]
    assert min(shares) > 0 and max(shares) <= 0.5
    assert len(set(shares)) > 10
    filled = ~np.stack(drawn)
    assert filled[:, :16].any() and filled[:, -16:].any() and filled[:, :, -12:].any()


def test_thin_masks_are_thinner_than_thick_ones():
    """By what is left after a window of 16 of 256 pixels must fit into the hole."""

    def wide(mask):
        windows = np.lib.stride_tricks.sliding_window_view(~mask, (17, 17))
        return windows[::4, ::4].all(axis=(2, 3)).mean()

    shares = {name: np.mean([wide(draw(name, seed)) for seed in range(8)]) for name in FREE_FORMS}
    assert shares["thin"] < 0.03 < shares["strokes"] < shares["thick"]


def test_masks_do_not_depend_on_the_number_of_images():
    pictures = [Picture(str(i), np.full((16, 16, 3), i, np.uint8)) for i in range(5)]
    for name in MASKS:
        few, many = (cut(pictures[:count], name, seed=4) for count in (2, 5))
        for first, second in zip(few, many, strict=False):
            np.testing.assert_array_equal(first.mask, second.mask)
    hole = cut(pictures, "half")[3]
    np.testing.assert_array_equal(hole.masked[0, :, 0], [3] * 8 + [128] * 8)


def test_polarity_of_files(tmp_path):
    white = draw("half", height=4, width=6)
    Image.fromarray(np.where(white, 200, 60).astype(np.uint8)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), white)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", "fill"), ~white)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


HOLE = np.array([[1, 1, 1], [1, 0, 1]], bool)  # known but for one pixel


def test_numbers_of_files_are_seen_against_their_range(tmp_path):
    sides = np.where(HOLE, 40000, 3000)
    for pixels in (sides.astype(np.uint16), (sides // 256).astype(np.uint8)):
        save(tmp_path / "mask.png", pixels)
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.png"), HOLE)
    save(tmp_path / "mask.png", np.full((2, 3), 3000, np.uint16))
    assert not read_mask(tmp_path / "mask.png").any()
    for kind in (np.uint8, np.uint16, np.int32, np.float32):  # label maps
        save(tmp_path / "mask.tif", HOLE.astype(kind))
        np.testing.assert_array_equal(read_mask(tmp_path / "mask.tif"), HOLE)
    save(tmp_path / "mask.tif", sides.astype(np.int32))
    with pytest.raises(UserError, match=r"mask.tif: .* 32 bits, and which of them is white is not"):
        read_mask(tmp_path / "mask.tif")


@pytest.mark.parametrize("polarity", masks.POLARITIES)
def test_what_is_transparent_is_the_hole_of_a_mask_of_one_colour(polarity, tmp_path):
    alpha = np.where(HOLE, 255, 0).astype(np.uint8)
    for hidden in (0, 255):  # colours that cannot be seen, as programs leave them behind
        for colour in (0, 90, 255):
            grey = np.where(HOLE, colour, hidden).astype(np.uint8)
            save(tmp_path / "mask.png", np.stack([grey] * 3 + [alpha], axis=-1))
            np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", polarity), HOLE)
    indices = Image.fromarray((~HOLE).astype(np.uint8), "P")
    indices.putpalette([255, 255, 255, 255, 255, 255])
    indices.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(read_mask(tmp_path / "palette.png", polarity), HOLE)
    save(tmp_path / "deep.png", np.where(HOLE, 65535, 7).astype(np.uint16), transparency=7)
    np.testing.assert_array_equal(read_mask(tmp_path / "deep.png", polarity), HOLE)


def test_a_mask_of_colours_and_transparency_is_refused(tmp_path):
    alpha = np.where(HOLE, 255, 0).astype(np.uint8)
    colours = np.array([[255, 0, 0], [255, 0, 0]], np.uint8)
    save(tmp_path / "two.png", np.stack([colours, alpha], axis=-1))
    save(tmp_path / "none.png", np.stack([colours, 0 * alpha], axis=-1))
    save(tmp_path / "opaque.png", np.stack([colours, 0 * alpha + 255], axis=-1))
    with pytest.raises(UserError, match=r"two.png: .* its colours show one mask and its transp"):
        read_mask(tmp_path / "two.png")
    with pytest.raises(UserError, match=r"none.png: not a readable mask: every pixel is transp"):
        read_mask(tmp_path / "none.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "opaque.png"), colours > 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photo_and_mask_are_turned_each_by_its_own_tag(orientation, tmp_path):
    """A square photo, whose size does not tell."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    mask = np.random.default_rng(0).random((6, 6)) < 0.5
    pixels = np.where(mask[..., None], 255, [9, 9, 9]).astype(np.uint8)
    turned = [  # by the table of the standard: where the first row and column are seen
        pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1],
        pixels.swapaxes(0, 1), np.rot90(pixels, -1), np.rot90(pixels, 2).swapaxes(0, 1),
        np.rot90(pixels),
    ][orientation - 1]  # fmt: skip
    save(tmp_path / "photos" / "a.png", pixels, exif=exif)
    save(tmp_path / "masks" / "a.png", (mask * 255).astype(np.uint8), exif=exif)
    save(tmp_path / "upright" / "a.png", turned)
    (picture,) = read_files(str(tmp_path / "photos"))
    np.testing.assert_array_equal(picture.image, turned)
    for folder in ("masks", "upright"):
        (hole,) = cut([picture], str(tmp_path / folder))
        np.testing.assert_array_equal(hole.mask, turned[..., 0] > 9)


def test_names_are_the_same_in_any_case_ending_and_composition(tmp_path):
    folder = tmp_path / "masks"
    names = {"a": "A.PNG", "b": "b.bmp", "sub/caf\u00e9": "Sub/CAFE\u0301.tiff", "c": "c.GIF"}
    for file in names.values():
        save(folder / file, np.zeros((2, 3), np.uint8))
    assert mask_files(folder, list(names)) == [folder / file for file in names.values()]
    save(folder / "a.png", np.zeros((2, 3), np.uint8))  # exactly the name counts first
    assert mask_files(folder, ["a", "A"]) == [folder / "a.png", folder / "A.PNG"]
    save(folder / "B.png", np.zeros((2, 3), np.uint8))
    save(folder / "C.png", np.zeros((2, 3), np.uint8))
    assert mask_files(folder, ["b", "B"]) == [folder / "b.bmp", folder / "B.png"]
    save(folder / "b.png", np.zeros((2, 3), np.uint8))
    for asked, message in (
        (["b"], "b.bmp, b.png are masks for image b: keep one"),
        (["sub/CAFE\u0301", "sub/caf\u00e9"], "Sub/CAFE.*: a mask for images .* and .*: give each"),
        (["d"], "masks: no mask for image d: expected .*d.png"),
    ):
        with pytest.raises(UserError, match=message):
            mask_files(folder, asked)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_tiny_images_fill_a_part_or_are_refused(name):
    for height, width in ((1, 3), (3, 1), (4, 4))[2 if name in FREE_FORMS else 0 :]:
        try:
            share = filled_share(draw(name, 0, height, width))
        except UserError as error:
            assert (
                str(error) == f"{width} x {height} pixels are too few for a mask of kind {name!r}"
            )
            assert min(height, width) == 1
        else:
            assert 0 < share < 1
    with pytest.raises(UserError, match="image dot: 1 x 1 pixels are too few"):
        cut([Picture("dot", np.zeros((1, 1, 3), np.uint8))], name)


def test_folders_pair_images_and_masks_by_name(tmp_path):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (4, 6, 3), np.uint8) for name in ("b", "a/c", "d")}
    for name, pixels in images.items():
        save(tmp_path / "images" / f"{name}.png", pixels)
        save(tmp_path / "masks" / f"{name}.webp", np.full((4, 6), 255 * (name == "b"), np.uint8))
    assert are_files(str(tmp_path / "images")) and not are_files("openmoji/people")
    pictures = read_files(str(tmp_path / "images"))
    assert [picture.name for picture in pictures] == ["a/c", "b", "d"]
    for picture in pictures:
        np.testing.assert_array_equal(picture.image, images[picture.name])
    holes = cut(pictures, str(tmp_path / "masks"))
    assert [filled_share(hole.mask) for hole in holes] == [1, 0, 1]
    assert len(read_files(str(tmp_path / "images"), num=2)) == 2
    assert are_files(str(tmp_path / "images" / "a" / "c.png"))
    (photo,) = read_files(str(tmp_path / "images" / "a" / "c.png"))
    assert photo.name == "c" and (photo.image == images["a/c"]).all()


def test_a_data_set_gives_its_split_without_what_cannot_be_decoded(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 5)):
        for index in range(count):
            save(tmp_path / split / f"{index}.png", rng.integers(0, 256, (9, 12, 3), np.uint8))
    (tmp_path / "test" / "2.png").write_bytes(b"no image")
    spec = DataSpec(name=str(tmp_path), split="test", image_size=8, flip=True, threads=1)
    pictures = read_data(spec)
    assert [picture.name for picture in pictures] == [f"{i:06}" for i in range(4)]
    assert {picture.image.shape for picture in pictures} == {(8, 8, 3)}
    assert len(read_data(spec, num=3)) == 3


def test_bad_input_is_named(tmp_path):
    picture = Picture("a", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    save(tmp_path / "small" / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for folder in ("twice/a.png", "twice/a.jpg"):
        save(tmp_path / folder, np.zeros((4, 4, 3), np.uint8))

    def refused(function, *arguments, message):
        with pytest.raises(UserError, match=message) as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)

    refused(read_files, str(tmp_path / "empty"), message="empty: no images there")
    nowhere = DataSpec(name=str(tmp_path / "none"))
    refused(read_data, nowhere, message="none: there is no such folder")
    refused(read_files, str(tmp_path / "broken"), message="a.png: not a readable image")
    refused(read_files, str(tmp_path / "twice"), message="another image is called a too")
    refused(
        cut,
        [picture],
        "wide",
        message="masks is 'wide': no such .* kinds are thin, strok",
    )
    refused(cut, [picture], str(tmp_path / "empty"), message="empty: no images there")
    refused(cut, [picture._replace(name="b")], str(tmp_path / "small"), message="image b: .*b.png")
    refused(cut, [picture], str(tmp_path / "broken"), message="a.png: not a readable mask")
    refused(
        cut, [picture], str(tmp_path / "small" / "a.png"),
        message="small/a.png: 4 x 4 pixels, but image a has 8 x 8 pixels",
    )  # fmt: skip
    with pytest.raises(ValueError, match="mask 'wide': choose one of thin"):
        draw("wide")
