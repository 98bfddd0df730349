"""Person crops without labels: where they lie, how one is decoded, and what happens to a broken one."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image, UnidentifiedImageError

from .dataset_loading import literal, load_rows, parquet_files, readme_configs, require_own_files, with_image_column
from .file_trees import (
    ARCHIVE_SUFFIXES,
    LMDB_SUFFIXES,
    FileTree,
    TarTree,
    UnreadableFile,
    given_path,
    is_lmdb,
    open_tree,
    opened_tree,
    read_address,
    walk_files,
    warn_of_skipped,
)
from .files import printable

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Only these decoders are tried: a file of any other kind is refused whatever its name says.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# 100 MB once decoded. A person crop has some 30,000; a file that claims more than this is an attack or a mistake.
MAX_IMAGE_PIXELS = 2**25
# A JPEG has one segment of EXIF, and some ten scans if it is progressive; each further one costs as much as the first.
_MAX_SCANS, _MAX_EXIF_SEGMENTS, _MAX_EXIF_BYTES = 200, 100, 2**16
_MAX_RLE_WIDTH = 2**16

# Marks a parquet file as the index of `personvit data select`, and holds what it is an index of, as JSON.
SELECTION_METADATA = b"personvit_selection"

_LUPERSON_NAMES = ("luperson", "lup")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_person_images(
    name_or_path: str | os.PathLike, root: str | os.PathLike | None = None, keep: Sequence[str] = ()
) -> datasets.Dataset:
    """Unlabelled person images as rows of undecoded files.

    Args:
        name_or_path: One of
            - a folder of images (jpg, jpeg, png, bmp, webp; any depth), sorted by path. Hidden files and files of
              other kinds are ignored; links to files and folders are followed, each folder once;
            - a folder with parquet files, or a Hub data set "owner/name", with a column `image`: its config
              "unlabelled" if its README defines one, else its default config; always the split `train`. Loose images
              beside the files are passed over if a README defines configs, else refused; embeddings are no images;
            - one parquet file; or the index of `personvit data select`, for the images of its data that are kept;
            - a .zip or .tar archive of images, or a folder of such archives;
            - an LMDB of encoded images by key, or a folder with one (needs the package lmdb);
            - "luperson": LUPerson in any of these forms, at `root`.
            Archives and LMDBs are read where they are, for each image anew. A compressed tar (.tar.gz) can only be
            read from the front: `personvit data prepare` does it, once.
        root: Where LUPerson is: the folder, archive or LMDB itself, or a folder that holds it under its usual name
            (luperson, LUP, lup).
        keep: Other columns to keep, of those that there are (track_id, say).

    Returns:
        `datasets.Dataset` with the column image, `datasets.Image(decode=False)`: rows are dicts of bytes
        (or None) and path. `PersonImages` decodes them; the path of a member of an archive is
        "zip://<member>::<archive>", which `decode_image` reads, too.

    Raises:
        FileNotFoundError: There is no such path or Hub data set.
        ValueError: Nothing usable is in it; the message names the path.

    Warns:
        UserWarning: Files are passed over, which it counts and names; or test pictures of a benchmark are read, too.
    """
    source = resolve_source(luperson_path(name_or_path, root) if root is not None else name_or_path)
    if isinstance(source, str):
        rows = require_own_files(load_rows(source, config="unlabelled", split="train"), source)
    elif source.is_file() and source.suffix.lower() == ".parquet":
        if (told := selection_settings(source)) is not None:
            return _selected(source, told, keep)
        rows = require_own_files(load_rows("parquet", split="train", data_files=literal(source)), source.parent)
    elif source.is_dir() and (shards := parquet_files(source)):
        _require_no_loose_images(source, shards)
        rows = require_own_files(load_rows(source, config="unlabelled", split="train"), source)
    else:
        _warn_of_test_pictures(source)
        addresses = []
        for tree in image_trees(source):
            if isinstance(tree, TarTree) and tree.is_compressed:
                raise ValueError(
                    f"{tree.path}: a compressed tar can't be read out of order; turn it into parquet with "
                    "`personvit data prepare`, or unpack it to a plain .tar."
                )
            warn_of_skipped(tree)
            addresses += [tree.address(name) for name in image_names(tree)]
        rows = datasets.Dataset.from_dict({"image": addresses}, datasets.Features({"image": datasets.Value("string")}))
    if not len(rows):
        raise ValueError(
            f"{name_or_path}: no image in it; expected parquet files or files {', '.join(IMAGE_SUFFIXES)}."
        )
    columns = ["image", *(column for column in keep if column in rows.column_names)]
    return with_image_column(rows, name_or_path, decode=False).select_columns(columns)


def _warn_of_test_pictures(folder: Path) -> None:
    """Of a Market-1501 tree all pictures are read, and those that models are tested on should teach none."""
    found = [name for name in ("query", "bounding_box_test") if (folder / name).is_dir()]
    if found and (folder / "bounding_box_train").is_dir():
        warnings.warn(
            f"{folder}: the test pictures in {' and '.join(found)} are read, too. "
            f"Give {folder / 'bounding_box_train'} for the training pictures alone.",
            stacklevel=3,
        )


def _require_no_loose_images(folder: Path, shards: list[str]) -> None:
    """Raises a ValueError if images lie beside parquet files, as either may be meant, and no README tells which."""
    loose = next((file for file in walk_files(folder) if file.lower().endswith(IMAGE_SUFFIXES)), None)
    if loose is not None and not readme_configs(folder):
        raise ValueError(
            f"{folder}: parquet files ({os.path.relpath(shards[0], folder)}) beside loose images "
            f"({os.path.relpath(loose, folder)}): either may be meant. Give a folder with one kind of them alone."
        )


def selection_settings(file: Path) -> dict[str, Any] | None:
    """What an index of `personvit data select` tells of itself; None for parquet of any other kind.

    Raises:
        ValueError: It is an index, but a damaged one.
    """
    try:
        found = (pq.read_schema(file).metadata or {}).get(SELECTION_METADATA)
    except pa.ArrowInvalid:
        return None  # no parquet: `load_rows` says so
    try:
        told = found and json.loads(found)
        good = told is None or (isinstance(told["data"], str) and isinstance(told["num_images"], int))
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{file}: an index of `personvit data select` that doesn't say what it is an index of.")
    return told


def require_no_index(data: str | os.PathLike) -> None:
    """Raises a ValueError if data are an index of `personvit data select`, which can't be selected from."""
    file = Path(data)
    if file.suffix.lower() == ".parquet" and file.is_file() and selection_settings(file) is not None:
        raise ValueError(f"{file}: this is an index of `personvit data select`. Select from the data themselves.")


def _selected(file: Path, told: dict[str, Any], keep: Sequence[str]) -> datasets.Dataset:
    try:
        require_no_index(told["data"])
    except ValueError as error:
        raise ValueError(f"{file}: an index of an index. {error}") from error
    try:
        rows = load_person_images(told["data"], keep=keep)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file}: the data that it selects from are gone: {error}") from error
    if len(rows) != told["num_images"]:
        raise ValueError(
            f"{file}: made when {told['data']} had {told['num_images']} images; now {len(rows)}. Select anew."
        )
    try:
        table = pq.read_table(file, columns=["row", "kept"])
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{file}: the index can't be read: {error}. Make it anew.") from error
    if table.schema.types != [pa.int64(), pa.bool_()] or any(column.null_count for column in table.columns):
        raise ValueError(f"{file}: expected an int64 `row` and a bool `kept` of each image. Make the index anew.")
    kept = table["row"].to_numpy()[table["kept"].to_numpy()]
    if not len(kept) or kept.min() < 0 or kept.max() >= len(rows):
        raise ValueError(f"{file}: keeps no image, or rows outside 0 to {len(rows) - 1}. Make the index anew.")
    return rows.select(kept)


def luperson_path(name: str | os.PathLike, root: str | os.PathLike) -> Path:
    """Where LUPerson is at or under `root`.

    Raises:
        ValueError: `name` is not "luperson" (or "lup").
        FileNotFoundError: There is no `root`.
    """
    if str(name).lower() not in _LUPERSON_NAMES:
        raise ValueError(f"`root` goes with the name of a data set, luperson; got {name}. Give a path without `root`.")
    root = given_path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder to look for {name} in.")
    while root.is_dir():  # archives and copies nest the name: luperson/LUP/...
        inside = sorted(entry for entry in root.iterdir() if entry.name.lower() in _LUPERSON_NAMES and entry.is_dir())
        if not inside:
            break
        root = inside[0]
    return root


def image_trees(source: Path) -> list[FileTree]:
    """Where the images of a folder, an archive or an LMDB lie: in itself, or in archives and LMDBs in that folder.

    Raises:
        ValueError: It is a file of another kind, can't be read, or has archives beside loose images.
    """
    if source.is_file() or is_lmdb(source):
        if source.is_file() and not (is_lmdb(source) or source.name.lower().endswith(ARCHIVE_SUFFIXES)):
            raise ValueError(
                f"{source}: expected a folder of images, a folder of parquet files, a .parquet file, an archive "
                f"({', '.join(ARCHIVE_SUFFIXES)}) or an LMDB."
            )
        return [opened_tree(source)]
    files = list(walk_files(source))
    # By their names first: a look at each of a million images takes longer than the walk.
    named = [Path(file) for file in files if file.lower().endswith((*ARCHIVE_SUFFIXES, *LMDB_SUFFIXES))]
    inner = {file for file in named if file.name.lower().endswith(ARCHIVE_SUFFIXES) or is_lmdb(file)}
    inner = {file.parent if file.name == "data.mdb" else file for file in inner}
    if not inner:
        return [open_tree(source)]
    loose = next((file for file in files if file.lower().endswith(IMAGE_SUFFIXES)), None)
    if loose:
        raise ValueError(
            f"{source}: archives ({sorted(inner)[0].name}) beside loose images ({os.path.basename(loose)}), which may "
            "be the same images twice. Give the archive or the folder of images alone."
        )
    return [opened_tree(path) for path in sorted(inner)]


def image_names(tree: FileTree) -> list[str]:
    """The files of a tree that are images by their names, sorted; all in an LMDB, whose keys have no endings."""
    return [name for name in tree.names if tree.kind == "lmdb" or name.lower().endswith(IMAGE_SUFFIXES)]


def decode_image(
    image: Mapping[str, Any] | bytes | str | os.PathLike, name: str = "image", max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Decodes one image, turned upright by its EXIF orientation.

    Pillow decodes, not OpenCV: same pixels from JPEG at three quarters of the speed (256x128), and the size can be
    checked before anything is decoded.

    Args:
        image: File content, a path or an address in an archive, or a row of `datasets.Image(decode=False)`: a dict
            with bytes or path.
        name: What an error calls the image.
        max_pixels: Largest height x width accepted, in pixels.

    Returns:
        (height, width, 3) uint8, RGB, writable. Grey, palette and CMYK images are converted, 16 bits
        become 8, transparency is dropped, and of an animation the first frame is taken.

    Raises:
        UnreadableFile: (a ValueError) It can't be read, is no JPEG, PNG, BMP or WebP, is cut off, or has more than
            `max_pixels`.
    """
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if image is None:
        raise UnreadableFile(f"{name}: no image data; expected the bytes or the path of an image.", "no image data")
    try:
        content = image if isinstance(image, bytes) else read_address(image)
    except UnreadableFile as error:
        raise UnreadableFile(f"{name}: {error}", error.reason) from error
    if not content:
        raise UnreadableFile(f"{name}: not an image of a kind that is read here: it is empty.", "empty file")
    _require_modest(content, name)
    try:
        with _quiet_about_exif(content), Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as picture:
            width, height = picture.size
            if width * height <= max_pixels:
                return rgb_pixels(picture)
    except UnidentifiedImageError as error:
        kinds = ", ".join(IMAGE_FORMATS)
        raise UnreadableFile(f"{name}: not an image of a kind that is read here ({kinds}).", "no image") from error
    except Image.DecompressionBombError as error:
        raise UnreadableFile(f"{name}: {error}", "too many pixels") from error
    except Exception as error:  # from bytes of any origin Pillow's decoders raise errors of a dozen types
        raise UnreadableFile(f"{name}: the image can't be read: {error}", "cut off or damaged") from error
    raise UnreadableFile(
        f"{name}: {height} x {width} pixels, more than the {max_pixels} accepted for a person crop.", "too many pixels"
    )


@contextmanager
def _quiet_about_exif(content: bytes) -> Iterator[None]:
    """Without Pillow's warnings of corrupt EXIF, one a tag.

    Pictures without EXIF leave the filters alone: a change of them makes Python show again what it has shown once.
    """
    if not any(mark in content for mark in (b"Exif", b"eXIf", b"EXIF", b"exif")):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _require_modest(content: bytes, name: str) -> None:
    """Raises an UnreadableFile for a JPEG or BMP that would keep a decoder busy for minutes, or take gigabytes."""
    problem = None
    if content.startswith(b"\xff\xd8"):
        counts = {"scans": content.count(b"\xff\xda"), "blocks of EXIF": content.count(b"Exif\0\0")}
        for part, most in (("scans", _MAX_SCANS), ("blocks of EXIF", _MAX_EXIF_SEGMENTS)):
            if counts[part] > most:
                problem = f"a JPEG of {counts[part]} {part}; more than {most} are refused, as no camera writes them"
    elif content.startswith(b"BM") and content[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        width = int.from_bytes(content[18:22], "little")
        if width > _MAX_RLE_WIDTH:  # Pillow before 13 takes 255 rows of it for 4 bytes of the file
            problem = f"a BMP with run lengths, {width} pixels wide; more than {_MAX_RLE_WIDTH} are refused"
    if problem:
        raise UnreadableFile(f"{name}: {problem}.", "cut off or damaged")


# what undoes EXIF's orientations 2 to 8
_UPRIGHT = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def rgb_pixels(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8 RGB of a PIL image of any mode, turned upright by its EXIF orientation."""
    picture.load()  # EXIF can follow the pixels
    orientation = _orientation(picture)
    if orientation in range(2, 9):  # ImageOps.exif_transpose fails where some other tag can't be written again
        picture = picture.transpose(Image.Transpose[_UPRIGHT[orientation - 2]])
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255 and not scale
        grey = (np.asarray(picture) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def _orientation(picture: Image.Image) -> Any:
    """What EXIF of any origin tells; None if it tells nothing, or is larger than a JPEG's can be."""
    exif = picture.info.get("exif") or picture.info.get("Raw profile type exif") or b""
    try:
        if len(exif) > _MAX_EXIF_BYTES:  # each of its entries may name all of it
            return None
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # it says nothing of the pixels
        return None


@dataclass(frozen=True)
class BrokenImage:
    """Stands in a batch for an image that could not be decoded."""

    name: str
    reason: str


class PersonImages:
    """Decoded images by index, for a PyTorch DataLoader.

    An item depends on its index alone, so worker processes and a resumed run see the same. A broken image is no
    exception but a `BrokenImage`; the collate function parts them off with `split_broken`, and the training loop
    gives them to a `BrokenImageBudget`.

    Args:
        rows: Data set with a column `image`; other columns are not read.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = with_image_column(rows, "rows", decode=False).select_columns("image").with_format(None)

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray | BrokenImage:
        """Image `index` as (height, width, 3) uint8 RGB, or why there is none."""
        image = self.rows[int(index)]["image"]
        path = image and image["path"]
        name = f"row {index} ({path})" if path else f"row {index}"
        try:
            return decode_image(image, name)
        except ValueError as error:
            return BrokenImage(name, str(error))


def split_broken(items: Iterable[Any]) -> tuple[list[Any], list[BrokenImage]]:
    """Parts the items of a batch into the good ones, in order, and the `BrokenImage`s."""
    good, broken = [], []
    for item in items:
        (broken if isinstance(item, BrokenImage) else good).append(item)
    return good, broken


class BrokenImageBudget:
    """Counts and reports broken images, and stops the run when their share is too large.

    It lives in the training process, not in DataLoader workers; with several training processes each watches its own
    part of the data.

    Args:
        max_broken_share: Largest share of broken images tolerated, a fraction in [0, 1].
        min_seen: Number of images of an epoch before which the share says nothing; `end_epoch` checks in any case.

    Raises:
        ValueError: max_broken_share is not in [0, 1].
    """

    def __init__(self, max_broken_share: float = 0.01, min_seen: int = 1000) -> None:
        if not 0 <= max_broken_share <= 1:
            raise ValueError(f"`max_broken_share` must be a fraction in [0, 1], got {max_broken_share}.")
        self.max_broken_share = max_broken_share
        self.min_seen = min_seen
        self.num_seen = 0
        self.num_broken = 0
        self.reasons: dict[str, str] = {}

    def count(self, broken: Sequence[BrokenImage], num_seen: int) -> None:
        """Adds a batch; each broken image is logged once.

        Args:
            broken: The broken images of the batch.
            num_seen: Number of images in the batch, broken ones included.

        Raises:
            RuntimeError: Their share of this epoch is over `max_broken_share`; the message names the last ones.
        """
        for image in broken:
            reason = printable(image.reason)
            if image.name not in self.reasons:
                logger.warning("Skipped a broken image. %s", reason)
            self.reasons[image.name] = reason
        self.num_seen += num_seen
        self.num_broken += len(broken)
        if self.num_seen >= self.min_seen:
            self._check()

    def end_epoch(self) -> int:
        """Checks the share whatever the number seen, reports, and starts the next epoch's count.

        Returns:
            The number of broken images in the epoch.

        Raises:
            RuntimeError: As in `count`.
        """
        self._check()
        num_broken = self.num_broken
        if num_broken:
            logger.warning("%d of %d images were broken and skipped.", num_broken, self.num_seen)
        self.num_seen = self.num_broken = 0
        return num_broken

    def _check(self) -> None:
        if self.num_broken > self.max_broken_share * self.num_seen:
            last = "\n".join(list(self.reasons.values())[-5:])
            raise RuntimeError(
                f"{self.num_broken} of {self.num_seen} images are broken, more than the share of "
                f"{self.max_broken_share:g} that is tolerated. Repair or remove them, or raise the share. The last "
                f"ones:\n{last}"
            )


def resolve_source(name_or_path: str | os.PathLike) -> Path | str:
    """The path if it exists on this machine, else the name if it has the form of a Hub data set, "owner/name".

    Raises:
        FileNotFoundError: It is neither.
    """
    path = given_path(name_or_path)
    if path.exists():
        return path
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name_or_path):
        return name_or_path
    raise FileNotFoundError(f"{name_or_path}: no such file or folder. (A data set on the Hub is written owner/name.)")
