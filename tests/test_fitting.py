"""Photos of any size for a model of one size: crops, borders, masks, and fillings laid over."""

import numpy as np
import pytest

from conprediff_jax.common.errors import UserError
from conprediff_jax.data import fitting
from conprediff_jax.data.holes import Hole, Picture
from conprediff_jax.sampling.inpainting import laid_over
from tests.test_masks import save

SIZES = [(800, 1200), (1200, 800), (31, 67), (32, 32), (5, 9), (96, 64)]


@pytest.mark.parametrize("fit", fitting.FITS)
def test_boxes_lie_inside_and_keep_their_shape(fit):
    for photo in SIZES:
        for image in ((32, 32), (32, 48)):
            placement = fitting.place(fit, photo, image)
            for box, room in ((placement.part, photo), (placement.place, placement.image)):
                rows, columns = box.within
                assert 0 <= rows.start < rows.stop <= room[0]
                assert 0 <= columns.start < columns.stop <= room[1]
            shown = placement.shown(np.zeros((*photo, 3), np.uint8))
            assert shown.shape == (*(photo if fit == "keep" else image), 3)
            if fit in ("crop", "pad"):  # equal scales, up to half a pixel
                scales = np.divide(placement.part.size, placement.place.size)
                assert abs(np.diff(scales)[0]) <= max(1, scales.max()) / min(placement.place.size)


def test_a_pixel_is_known_where_all_pixels_of_the_photo_under_it_are():
    mask = np.random.default_rng(0).random((96, 96)) > 0.1
    found = fitting.place("crop", (96, 96), (32, 32)).known(mask)
    np.testing.assert_array_equal(found, mask.reshape(32, 3, 32, 3).all(axis=(1, 3)))
    one = np.ones((799, 1203), bool)
    one[400, 600] = False  # one pixel of many is not rounded off
    known = fitting.place("resize", one.shape, (16, 16)).known(one)
    assert 1 <= (~known).sum() <= 4 and not known[8, 7:9].all()


def photo_with_a_hole(fit, rows, columns):
    """A grey photo, 120 x 180, with a red hole."""
    image = np.full((120, 180, 3), 100, np.uint8)
    mask = np.ones((120, 180), bool)
    mask[rows, columns] = False
    image[~mask] = (255, 0, 0)
    return fitting.from_photo(Hole("a", image, mask), fit, (32, 32))


@pytest.mark.parametrize("fit", ["crop", "pad", "resize"])
def test_colours_of_the_hole_stay_in_it_and_fillings_leave_the_rest(fit):
    fitted = photo_with_a_hole(fit, slice(50, 71), slice(120, 143))
    hole, border = fitted.hole, fitted.placement.place.within
    assert not hole.mask[border].all()
    assert (hole.image[hole.mask] == 100).all()
    filling = np.where(hole.mask[..., None], hole.image, np.uint8(180))
    whole = laid_over(fitted, filling)
    known = fitted.photo.mask
    np.testing.assert_array_equal(whole[known], fitted.photo.image[known])
    assert abs(whole[55:66, 126:137].astype(int) - 180).max() <= 40  # blended in from the rim
    middle = whole[60, 131].astype(int)
    assert (middle == middle[0]).all() and middle[0] > 140


def test_a_crop_follows_the_hole_as_far_as_the_photo_goes():
    fitted = photo_with_a_hole("crop", slice(0, 30), slice(150, 180))
    assert fitted.placement.part == fitting.Box(0, 60, 120, 120)
    assert (
        fitted.placement.describe() == "180 x 120 pixels, cropped to 120 x 120, resized to 32 x 32"
    )
    wide = photo_with_a_hole("crop", slice(0, 30), slice(0, 180))
    assert wide.placement.part == fitting.Box(0, 30, 120, 120)
    with pytest.raises(UserError, match="image a: nothing of its hole is left"):
        two = np.ones((10, 90), bool)
        two[0, 0] = two[0, 89] = False
        fitting.from_photo(Hole("a", np.zeros((10, 90, 3), np.uint8), two), "crop", (8, 8))


def test_masks_of_both_kinds_are_cut_for_photo_and_image(tmp_path):
    photos = [Picture("a", np.zeros((60, 90, 3), np.uint8))]
    (drawn,) = fitting.cut(photos, "box", fit="pad", size=(32, 32))
    assert drawn.hole.mask.shape == (32, 32) and drawn.photo.mask.shape == (60, 90)
    assert not drawn.hole.mask[:5].any()  # the border is filled by the model
    share = (~drawn.photo.mask).mean()
    assert share == pytest.approx(16 * 16 / (21 * 32), rel=0.1)
    mask = np.full((60, 90), 255, np.uint8)
    mask[20:40, 30:60] = 0
    save(tmp_path / "mask.png", mask)
    (read,) = fitting.cut(photos, str(tmp_path / "mask.png"), fit="crop", size=(30, 30))
    np.testing.assert_array_equal(read.photo.mask, mask > 0)
    rows, columns = np.nonzero(~read.hole.mask)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (10, 19, 7, 22)
