"""Person crops without labels: where they lie, how one is decoded, and what happens to a broken one."""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# Only these decoders are tried: a file of any other kind is refused whatever its name says.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# 100 MB once decoded. A person crop has some 30,000; a file that claims more than this is an attack or a mistake.
MAX_IMAGE_PIXELS = 2**25

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def load_person_images(name_or_path: str | os.PathLike) -> datasets.Dataset:
    """Unlabelled person images as rows of undecoded files.

    Args:
        name_or_path: One of
            - a folder of images (jpg, jpeg, png, bmp, webp; any depth), sorted by path. Hidden files and files of
              other kinds are ignored; links to files and folders are followed, each folder once;
            - a folder with parquet files, or a Hub data set "owner/name", with a column `image`: its config
              "unlabelled" if its README defines one, else its default config; always the split `train`;
            - one parquet file.

    Returns:
        `datasets.Dataset` with the single column image, `datasets.Image(decode=False)`: rows are dicts of bytes
        (or None) and path. `PersonImages` decodes them.

    Raises:
        FileNotFoundError: There is no such path or Hub data set.
        ValueError: Nothing usable is in it; the message names the path.
    """
    source = resolve_source(name_or_path)
    if isinstance(source, str):
        rows = load_rows(source, config="unlabelled", split="train")
    elif source.is_file():
        if source.suffix.lower() != ".parquet":
            raise ValueError(f"{source}: expected a folder of images, a folder of parquet files or a .parquet file.")
        rows = load_rows("parquet", split="train", data_files=str(source))
    else:
        files = list(walk_files(source))
        if any(file.endswith(".parquet") for file in files):
            rows = load_rows(str(source), config="unlabelled", split="train")
        else:
            paths = sorted(file for file in files if file.lower().endswith(IMAGE_SUFFIXES))
            rows = datasets.Dataset.from_dict({"image": paths}, datasets.Features({"image": datasets.Value("string")}))
    if not len(rows):
        raise ValueError(
            f"{name_or_path}: no image in it; expected parquet files or files {', '.join(IMAGE_SUFFIXES)}."
        )
    return with_image_column(rows, name_or_path, decode=False).select_columns("image")


def decode_image(
    image: Mapping[str, Any] | bytes | str | os.PathLike, name: str = "image", max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Decodes one image, turned upright by its EXIF orientation.

    Pillow decodes, not OpenCV: same pixels from JPEG at three quarters of the speed (256x128), and the size can be
    checked before anything is decoded.

    Args:
        image: File content, a path, or a row of `datasets.Image(decode=False)`: a dict with bytes or path.
        name: What an error calls the image.
        max_pixels: Largest height x width accepted, in pixels.

    Returns:
        (height, width, 3) uint8, RGB, writable. Grey, palette and CMYK images are converted, transparency is dropped.

    Raises:
        ValueError: It can't be read, is no JPEG, PNG, BMP or WebP, is cut off, or has more than `max_pixels`.
    """
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if image is None:
        raise ValueError(f"{name}: no image data; expected the bytes or the path of an image.")
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=IMAGE_FORMATS) as picture:
            width, height = picture.size
            if width * height <= max_pixels:
                ImageOps.exif_transpose(picture, in_place=True)
                return np.array(picture.convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image of a kind that is read here ({', '.join(IMAGE_FORMATS)}).") from error
    except Exception as error:  # from bytes of any origin Pillow's decoders raise errors of a dozen types
        raise ValueError(f"{name}: the image can't be read: {error}") from error
    raise ValueError(f"{name}: {height} x {width} pixels, more than the {max_pixels} accepted for a person crop.")


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
        max_pixels: As in `decode_image`.
    """

    def __init__(self, rows: datasets.Dataset, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
        self.rows = with_image_column(rows, "rows", decode=False).select_columns("image").with_format(None)
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        """Number of images, broken ones included."""
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray | BrokenImage:
        """Image `index` as (height, width, 3) uint8 RGB, or why there is none."""
        image = self.rows[int(index)]["image"]
        path = image and image["path"]
        name = f"row {index} ({path})" if path else f"row {index}"
        try:
            return decode_image(image, name, self.max_pixels)
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
        max_share: Largest share of broken images tolerated, a fraction in [0, 1].
        min_seen: Number of images of an epoch before which the share says nothing; `end_epoch` checks in any case.

    Raises:
        ValueError: max_share is not in [0, 1].
    """

    def __init__(self, max_share: float = 0.01, min_seen: int = 1000) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"`max_share` must be a fraction in [0, 1], got {max_share}.")
        self.max_share = max_share
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
            RuntimeError: Their share of this epoch is over `max_share`; the message names the last ones.
        """
        for image in broken:
            if image.name not in self.reasons:
                logger.warning("Skipped a broken image. %s", image.reason)
            self.reasons[image.name] = image.reason
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
        if self.num_broken > self.max_share * self.num_seen:
            last = "\n".join(list(self.reasons.values())[-5:])
            raise RuntimeError(
                f"{self.num_broken} of {self.num_seen} images are broken, more than the share of {self.max_share:g} "
                f"that is tolerated. Repair or remove them, or raise the share. The last ones:\n{last}"
            )


def resolve_source(name_or_path: str | os.PathLike) -> Path | str:
    """The path if it exists on this machine, else the name if it has the form of a Hub data set, "owner/name".

    Raises:
        FileNotFoundError: It is neither.
    """
    path = Path(name_or_path).expanduser().absolute()
    if path.exists():
        return path
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name_or_path):
        return name_or_path
    raise FileNotFoundError(f"{name_or_path}: no such file or folder. (A data set on the Hub is written owner/name.)")


def load_rows(source: str, config: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset` with the wanted config where the data set defines it, and with errors that name it.

    Args:
        source: Folder, Hub data set or "parquet".
        config: Config to take if the data set's README defines it; else its default config is taken.
        options: Go to `datasets.load_dataset`.

    Raises:
        FileNotFoundError: Neither a folder nor a Hub data set that can be reached.
        ValueError: Its files or splits can't be read.
    """
    try:
        if config is not None and config not in datasets.get_dataset_config_names(source):
            config = None
        return datasets.load_dataset(source, config, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source}: no such folder, and no such data set reached on the Hub: {error}"
        ) from error
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{options.get('data_files', source)}: can't be read: {error.__cause__ or error}") from error


def with_image_column(rows: datasets.Dataset, source: Any, decode: bool) -> datasets.Dataset:
    """`rows` with the column image as `datasets.Image(decode=decode)`; an error that names `source` if it can't be."""
    if "image" not in rows.column_names:
        raise ValueError(f"{source}: no column `image`; found {', '.join(rows.column_names)}.")
    try:
        return rows.cast_column("image", datasets.Image(decode=decode))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"{source}: column `image` holds {rows.features['image']}, not images.") from error


def walk_files(root: Path) -> Iterable[str]:
    """Paths of all files under `root` that aren't hidden. Links to folders are followed, each real folder once."""
    visited = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))
