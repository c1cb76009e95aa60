"""Image files: finding, ordering and opening them; writing grids, PNGs and npz archives.

Files are written under a temporary name and then moved.
"""

import collections
import functools
import io
import math
import os
import pathlib
import re
import struct
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from einops import rearrange
from etils import epath
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from conprediff_jax.common.errors import DataError, FieldError, UserError, printable
from conprediff_jax.common.files import write_atomically, write_new

Images = UInt8[np.ndarray, "count height width channels"]

# Endings of the files that are read (of an animation, the first frame), and of image files that are
# not read.
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff", ".avif"),
)
_UNREAD = (
    *(".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".eps", ".ico", ".tga"),
    *(".pbm", ".pgm", ".pnm", ".ppm", ".exr", ".hdr"),
    *(".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
# Formats of pictures and of arrays that are written, by the ending of the name.
PICTURES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
ARRAYS = (".npz", ".npy")
_OPTIONS = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}
_LARGEST = {"jpeg": 65_500, "webp": 16_383}  # pixels a side
_LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")  # folders that other programs leave behind

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAGS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # keys of Pillow's `info`

# Pillow warns of EXIF tags that are not used here, with several lines for many photos.
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")


class BadImage(UserError):
    """Bytes that are not an image, or a damaged one. The message gives the reason in one line."""


def natural_key(name: str) -> tuple:
    """A sort key for the natural order of names: `2.png` comes before `10.png`.

    The order is total and the same on every machine. Paths are compared part by part, and letters
    by their code points after Unicode composition. Equal numbers, such as `1` and `01`, are ordered
    by their text. The ending of a file counts last, so that names with endings stand in the order
    of the names without.

    Args:
        name: Name of a file, relative to its folder, with "/" between its parts.
    """
    stem, ending = os.path.splitext(name)
    return _comparable(stem), _comparable(ending), name


def _comparable(text: str) -> str:
    """A text that sorts numbers by size, and the end of a folder's name before all else."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return re.sub("[0-9]+", _by_size, text).replace("/", "\0")


def _by_size(number: re.Match) -> str:
    digits = number[0].lstrip("0")
    return f"\1{chr(len(digits))}{digits}"


def list_images(root: pathlib.Path) -> list[str]:
    """The image files of a folder and its subfolders, relative to it, by `natural_key`.

    Links are followed, except links to a folder that they lie in. A folder that several paths lead
    to is read once: under its own path if that lies below `root`, or else under the shortest path.
    So links in a circle end. Hidden files and folders, and folders that other programs leave behind
    (`__MACOSX`), are left out. A link that leads nowhere is listed: it counts as an image that
    cannot be read. Hidden folders and images, and image files of kinds that are not read, are
    counted in a line of the log each.

    Raises:
        DataError: There are no images, or a folder cannot be read.
    """
    files, unread, hidden = [], collections.Counter(), []
    for path, entry in _walk(root, hidden):
        ending = os.path.splitext(entry.name)[1].lower()
        if ending in EXTENSIONS and _is_file(entry):
            files.append(path)
        elif ending in _UNREAD and _is_file(entry):
            unread[ending] += 1
    if hidden:
        hidden.sort(key=natural_key)
        such = f"such as {printable(hidden[0])}"
        warn_once(f"{root}: left out {len(hidden)} hidden folders and images, {such}")
    if unread:
        counts = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
        warn_once(f"{root}: left out {counts}, which are not read")
    if not files:
        found = f"; there are {counts}, which are not read" if unread else ""
        raise DataError(f"{root}: no images there ({', '.join(EXTENSIONS)}){found}")
    return sorted(files, key=natural_key)


def list_beside(root: pathlib.Path, endings: Sequence[str]) -> dict[str, str]:
    """The files with some endings, in the folders that `list_images` reads.

    Args:
        root: The folder.
        endings: Endings in lower case. Of files with one stem, the first ending counts.

    Returns:
        The paths of the files, relative to the folder, by these paths without their endings.
    """
    found = {}
    for path, entry in _walk(root):
        stem, ending = os.path.splitext(path)
        if (ending := ending.lower()) in endings and _is_file(entry):
            found[endings.index(ending), stem] = path
    return {stem: found[place, stem] for place, stem in sorted(found, reverse=True)}


def _walk(root: pathlib.Path, hidden: list[str] | None = None) -> Iterator[tuple[str, os.DirEntry]]:
    """The files below a folder, with their paths relative to it; every folder is read once.

    Args:
        root: The folder.
        hidden: A list to which the paths of hidden folders and images are added.
    """
    folders, links, seen = [""], [], set()
    while folders or links:  # links last, short ones first, so that folders keep their own paths
        if not folders:
            links.sort(key=lambda path: (path.count("/"), natural_key(path)), reverse=True)
        folder = (folders or links).pop()
        try:
            status = os.stat(root / folder)
            if (identity := (status.st_dev, status.st_ino)) in seen:
                warn_once(f"{root / folder}: left out, a link to a folder that is read")
                continue
            seen.add(identity)
            entries = list(os.scandir(root / folder))
        except OSError as error:
            raise DataError(f"{root / folder}: cannot be read: {error.strerror}") from error
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if _is_hidden(entry.name):
                is_litter = entry.name.startswith("._") or entry.name in _LITTER
                wanted = _is_folder(entry) or entry.name.lower().endswith(EXTENSIONS)
                if hidden is not None and wanted and not is_litter:
                    hidden.append(path)
                continue
            if not _is_folder(entry):
                yield path, entry
            elif _leads_up(entry):
                warn_once(f"{root / path}: left out, a link to a folder that it lies in")
            else:
                (links if entry.is_symlink() else folders).append(path)


def list_folders(root: pathlib.Path) -> list[str]:
    """The names of the subfolders that `list_images` would read, in their natural order."""
    folders = [entry for entry in os.scandir(root) if _is_folder(entry) and not _leads_up(entry)]
    names = [folder.name for folder in folders if not _is_hidden(folder.name)]
    return sorted(names, key=natural_key)


def holds_images(root: str | os.PathLike) -> bool:
    """Whether a folder or one of its subfolders has a file whose ending is that of an image."""
    endings = (*EXTENSIONS, *_UNREAD)
    found = (file for _, _, files in os.walk(root) for file in files)
    return any(file.lower().endswith(endings) for file in found)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LITTER


_warned: dict[str, None] = {}  # the lines that were logged, in their order


def warn_once(line: str) -> None:
    """Logs a warning the first time only: a run lists a folder several times."""
    if line not in _warned:
        _warned[line] = None
        logging.warning("%s", line)


def warned() -> tuple[str, ...]:
    """What this process has logged by `warn_once`, for a report."""
    return tuple(_warned)


def _leads_up(folder: os.DirEntry) -> bool:
    """Whether an entry is a link to a folder that it lies in, directly or through other folders."""
    path = pathlib.Path(folder.path)
    return folder.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _is_folder(entry: os.DirEntry) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
    """Whether an entry is a file, or a link to a file or to nothing."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; the image itself if there is none.

    No other tag is read, and a turned image has no EXIF. EXIF data that cannot be read count as no
    orientation.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of any type, and the image itself is not affected
        orientation = None
    if orientation is None:
        orientation = _orientation(image.info.get("exif", b""))
    turn = _TURNS.get(orientation)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for tag in _TAGS:
        turned.info.pop(tag, None)
    return turned


def _orientation(exif: bytes) -> int | None:
    """The orientation in a block of EXIF, whose other tags may be broken; None if there is none.

    Pillow below 13 stops at the first tag that it cannot read.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, values, value = struct.unpack_from(f"{order}HHIH", block, place)
            if (tag, kind, values) == (ExifTags.Base.Orientation, 3, 1):
                return value
    except struct.error:  # the block is cut short, or no block
        pass
    return None


def _scale_transparent(image: Image.Image, depth: int) -> None:
    """Converts the transparent colour of a PNG, if it has one, to the range of the pixels.

    Pillow converts samples of 2, 4 and (in RGB images) 16 bits to 8 bits, but not this colour.

    Args:
        image: The decoded image.
        depth: Bits per sample in the file.

    Raises:
        BadImage: The colour has 16 bits per sample, of which the pixels have lost 8.
    """
    colour = image.info.get("transparency")
    if colour is None:
        return
    if image.mode == "L":
        image.info["transparency"] = (colour % 2**depth) * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16:
        raise BadImage("of its 16-bit colours one is transparent: save it with an alpha channel")
    elif image.mode == "RGB":
        image.info["transparency"] = tuple(value % 256 for value in colour)


def read_image(data: bytes, at_least: int = 0) -> Image.Image:
    """Decodes the bytes of an image file of any mode, and turns the image `upright`.

    Args:
        data: The bytes of a file of one of `EXTENSIONS`.
        at_least: If positive, a JPEG may be decoded at a reduced size, with no side shorter than
            this.

    Raises:
        BadImage: The bytes are not an image, or a damaged one.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if at_least:
            image.draft("RGB", (at_least, at_least))
        image.load()
        if image.format == "PNG":  # without `verify`, Pillow checks only some of the checksums
            Image.open(io.BytesIO(data)).verify()
            _scale_transparent(image, depth=data[24])
    except BadImage:
        raise
    except UnidentifiedImageError as error:  # its message only has the address of the bytes
        raise BadImage("the file is empty" if not data else "not a known kind of image") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises errors of any type
        raise BadImage((str(error).splitlines() or [type(error).__name__])[0]) from error
    return upright(image)


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels of a size that may be the side of a square."""
    return (size, size) if isinstance(size, int) else tuple(size)


def as_rgb(
    images: UInt8[np.ndarray, "*shape channels"],
) -> UInt8[np.ndarray, "*shape 3"]:
    """An image or images of 1, 3 or 4 channels as RGB; transparent ones on white."""
    if images.shape[-1] == 1:
        return images.repeat(3, axis=-1)
    if images.shape[-1] == 4:
        opacity = images[..., 3:].astype(np.float32) / 255
        return np.rint(images[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)
    return images


def as_picture(image: UInt8[np.ndarray, "height width channels"]) -> Image.Image:
    """The picture of 1 (grey), 3 (RGB) or 4 channels (RGB with transparency)."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def grid(
    images: Images, *, columns: int | None = None, gap: int = 2, least: int = 64
) -> UInt8[np.ndarray, "grid_height grid_width channels"]:
    """A grid of images on white, as square as their number allows.

    Args:
        images: The images, uint8.
        columns: Images per row; by default the square root of their number, rounded up.
        gap: Width of the white lines between images, in pixels.
        least: Images with a smaller side are enlarged by a whole factor until it has this many
            pixels.
    """
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = math.ceil(least / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    missing = -len(images) % columns
    images = np.pad(images, ((0, missing), (0, gap), (0, gap), (0, 0)), constant_values=255)
    images[len(images) - missing :] = 255
    joined = rearrange(images, "(r c) h w k -> (r h) (c w) k", c=columns)
    return np.pad(joined, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)


def captioned(
    images: Images, captions: Sequence[str], *, least: int = 96
) -> UInt8[np.ndarray, "count captioned_height captioned_width 3"]:
    """Images with their captions below them, in small print and broken into lines.

    Args:
        images: The images, uint8; the result is RGB.
        captions: One caption for every image.
        least: See `grid`; narrow images would leave no room for words.
    """
    images = as_rgb(images)
    scale = math.ceil(least / images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    width, font = images.shape[2], ImageFont.load_default(size=10)
    broken = [textwrap.wrap(caption, max(8, width // 6)) or [""] for caption in captions]
    room = 12 * max(map(len, broken)) + 4
    labels = []
    for lines in broken:
        label = Image.new("RGB", (width, room), "white")
        ImageDraw.Draw(label).multiline_text((1, 0), "\n".join(lines), "black", font, spacing=2)
        labels.append(np.asarray(label))
    return np.concatenate([images, np.stack(labels)], axis=1)


def output_ending(path: str | os.PathLike) -> str:
    """The ending of an output's name in lower case, which decides its format; '' for a folder.

    A folder may have a dot and digits at the end of its name, such as `guidance_1.5`.

    Args:
        path: The name; it ends in '/' or names an existing folder where a folder is meant whatever
            its ending.

    Raises:
        FieldError: The name has an ending that is no format.
    """
    text = os.fspath(path)
    ending = os.path.splitext(text)[1].lower()
    if ending in (*PICTURES, *ARRAYS):
        return ending
    if not re.fullmatch(r"\.\D\w*", ending) or text.endswith("/") or os.path.isdir(text):
        return ""
    formats = ", ".join((*PICTURES, *ARRAYS))
    raise FieldError("out", f"is {text}: its ending must be one of {formats}, or none for a folder")


def check_grid(path: str | os.PathLike, count: int, size: tuple[int, int]) -> None:
    """Checks, before anything is drawn, that a picture of a format can be as large as a `grid`.

    Args:
        path: The picture.
        count: Number of images in the grid.
        size: Height and width of an image, in pixels.

    Raises:
        FieldError: The format has smaller pictures only.
    """
    scale = math.ceil(64 / size[0])
    side = math.ceil(math.sqrt(count)) * (max(size) * scale + 2) + 2
    most = _LARGEST.get(PICTURES[output_ending(path)], side)
    if side > most:
        raise FieldError(
            "out",
            f"is {os.fspath(path)}: a grid of {count} images has {side} pixels a side, and a file "
            f"of this kind {most} at most; name a .png, an .npz or a folder",
        )


def write_picture(
    path: str | os.PathLike, image: UInt8[np.ndarray, "height width channels"], settings: str = ""
) -> None:
    """Writes a picture in the format that its ending names, one of `PICTURES`.

    Args:
        path: The file. A WebP is written without loss, and a JPEG in high quality and without
            transparency.
        image: The picture.
        settings: What the picture was made by; a PNG carries this text under the key 'settings'.
    """
    kind = PICTURES[output_ending(path)]
    options = dict(_OPTIONS.get(kind, {}))
    if kind == "png" and settings:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("settings", settings)
    picture = as_picture(as_rgb(image) if kind == "jpeg" else image)
    write_atomically(path, functools.partial(picture.save, format=kind, **options))


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "height width channels"]) -> None:
    """Writes a PNG file."""
    write_atomically(path, functools.partial(as_picture(image).save, format="png"))


def write_new_png(
    path: str | os.PathLike, image: UInt8[np.ndarray, "height width channels"]
) -> bool:
    """Writes a PNG file unless the file exists; returns whether it did. See `files.write_new`."""
    return write_new(path, functools.partial(as_picture(image).save, format="png"))


def write_npz(path: str | os.PathLike, images: Images, settings: str = "") -> None:
    """Writes all images as `arr_0` of an npz file, the layout of ADM's sample batches.

    Args:
        path: The file.
        images: The images.
        settings: What the images were made by; the array `settings` holds this text, and readers of
            images leave it alone.
    """
    more = {"settings": np.array(settings)} if settings else {}
    write_atomically(path, lambda file: np.savez(file, images, **more))


def read_npz(path: str | os.PathLike) -> Images:
    """Reads the images of an npz that `write_npz` has written."""
    with epath.Path(path).open("rb") as file, np.load(file) as arrays:
        return arrays["arr_0"]


def write_npy(path: str | os.PathLike, images: Images) -> None:
    """Writes all images as one array in an npy file."""
    write_atomically(path, lambda file: np.save(file, images))
