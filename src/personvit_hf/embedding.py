"""Images in, vectors out: the features that retrieval compares, in memory or in a folder of any size."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from pyarrow import ArrowException, Table, concat_tables, parquet
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, PreTrainedModel

from .dataset_loading import EMBEDDINGS_FILE as SETTINGS_FILE
from .embedding_tables import describe, first_change, id_columns, read_table
from .files import read_json, require_writable_folder, written_aside
from .person_images import BrokenImage, BrokenImageBudget, PersonImages, decode_image, rgb_pixels, split_broken
from .preemption import ignore_stop_requests

SHARD_IMAGES = 4096
logger = logging.getLogger(__name__)

_FORMAT = 1


class _ProcessedImages(torch.utils.data.Dataset):
    """(index, pixel values) by index, so that DataLoader workers decode and resize; or a BrokenImage."""

    def __init__(self, images: Sequence[Any] | datasets.Dataset, processor: BaseImageProcessor):
        self.images = PersonImages(images) if isinstance(images, datasets.Dataset) else images
        self.processor = processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor] | BrokenImage:
        image = self.images[index]
        if isinstance(image, BrokenImage):
            return image
        name = str(image) if isinstance(image, str | os.PathLike) else f"image {index}"
        if not isinstance(image, Mapping | bytes | str | os.PathLike | np.ndarray | Image.Image | None):
            raise ValueError(
                f"{name} must be a path, a PIL image, bytes or a uint8 array (height, width, 3), got "
                f"{type(image).__name__}. What a processor has made of images goes to the model itself."
            )
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"{name} must be (height, width, 3) of uint8, got {image.shape} of {image.dtype}.")
            image = np.ascontiguousarray(image)
        else:
            is_open = isinstance(image, Image.Image)
            try:
                image = rgb_pixels(_of_known_white(image)) if is_open else decode_image(image, name)
            except (ValueError, OSError) as error:
                return BrokenImage(name, f"{name}: {error}" if is_open else str(error))
        # a picture 1, 3 or 4 pixels high could be taken for one with channels first
        options = {"input_data_format": "channels_last", "return_tensors": "pt"}
        return index, self.processor(images=image, **options).pixel_values[0]


def _of_known_white(picture: Image.Image) -> Image.Image:
    """An open picture, grey of 8 bits as such; ValueError if its mode doesn't tell how bright its values are."""
    if picture.mode == "F":
        raise ValueError("a picture of mode F (floats), whose white isn't known; scale it to 0 to 255, make it RGB.")
    if picture.mode == "I" and picture.format != "PNG":  # whose 16 bits are mode I to older Pillow
        low, high = picture.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f"a picture of mode I with values from {low} to {high}; expected 0 to 255 or 0 to 65535.")
        return picture.convert("L") if high <= 255 else picture
    return picture


def _stack_good(
    items: Sequence[tuple[int, torch.Tensor] | BrokenImage],
) -> tuple[tuple[int, ...], torch.Tensor | None, list[BrokenImage]]:
    """Indices and pixels of a batch's good images, and its broken ones.

    One tensor leaves a worker, not one an image: each takes a file descriptor of the process that gets it, of which
    large batches would use up all.
    """
    good, broken = split_broken(items)
    if not good:
        return (), None, broken
    indices, pixel_values = zip(*good, strict=True)
    return indices, torch.stack(pixel_values), broken


@torch.inference_mode()
def embed_images(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Sequence[Any] | datasets.Dataset,
    camera_ids: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    max_broken_share: float = 0.0,
    progress: bool = False,
) -> np.ndarray:
    """Embeds person images, in their order.

    Args:
        model: PersonViTModel ([CLS] feature) or PersonViTForReID (`embeddings`), on any device.
        processor: The model's own image processor.
        images: Rows with a column `image`, or a sequence of paths, PIL images, file contents (bytes) or
            uint8 (height, width, 3) RGB arrays.
        camera_ids: Cameras from 0, one an image, for models with `num_cameras`.
        batch_size: Images a forward pass.
        num_workers: Processes that decode and resize; 0 for this one.
        max_broken_share: Largest share of images that may be broken. Those are logged, and their rows are NaN.
        progress: Whether to show a progress bar.

    Returns:
        float32 (images, hidden), each row of length 1 (or NaN).

    Raises:
        ValueError: if `images` is one image or holds what is none, `camera_ids` has another length or an array another
            shape; or if a good image's features are NaN or infinite: then the model or the processor is broken.
        RuntimeError: if more images than `max_broken_share` can't be decoded; they are named.
    """
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        raise ValueError(f"`images` must be a sequence of images, got {type(images).__name__} alone: write [image].")
    if camera_ids is not None and len(camera_ids) != len(images):
        raise ValueError(f"`camera_ids` must have one entry an image: {len(camera_ids)} for {len(images)} images.")
    processed = _ProcessedImages(images, processor)
    loader = DataLoader(
        processed,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_stack_good,
        worker_init_fn=ignore_stop_requests,  # a run that is told to stop while it scores ends that first
        # of its own, so that scoring a model draws nothing from the generator that its training uses
        generator=torch.Generator(),
    )
    budget = BrokenImageBudget(max_broken_share)
    embeddings = np.full((len(processed), model.config.hidden_size), np.nan, np.float32)
    modes = {module: module.training for module in model.modules()}  # a teacher's batch norms train, the rest doesn't
    model.eval()
    try:
        for indices, pixel_values, broken in tqdm(loader, desc="Embedding", disable=not progress):
            budget.count(broken, len(indices) + len(broken))
            if pixel_values is None:
                continue
            sides = {}
            if camera_ids is not None:
                sides["camera_ids"] = torch.tensor([int(camera_ids[i]) for i in indices], device=model.device)
            outputs = model(pixel_values.to(model.device), **sides)
            features = outputs["embeddings"] if "embeddings" in outputs else outputs["pooler_output"]
            features = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
            _require_finite(features, pixel_values, indices, model, processor)
            embeddings[list(indices)] = features.numpy()
        budget.end_epoch()
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    return embeddings


def _require_finite(
    features: torch.Tensor,
    pixel_values: torch.Tensor,
    indices: Sequence[int],
    model: PreTrainedModel,
    processor: BaseImageProcessor,
) -> None:
    """Tells a model or processor that makes no numbers of good images from broken images, whose rows are NaN, too."""
    wrong = (~features.isfinite().all(dim=-1)).nonzero().flatten().tolist()
    if not wrong:
        return
    cause = f"the weights of the model {model.config._name_or_path or type(model).__name__} are damaged, or overflow"
    if not pixel_values[wrong[0]].isfinite().all():
        statistics = {name: getattr(processor, name, None) for name in ("rescale_factor", "image_mean", "image_std")}
        told = ", ".join(f"{name} {value}" for name, value in statistics.items())
        cause = f"the image processor makes no finite pixels of it ({told})"
    raise ValueError(f"The features of image {indices[wrong[0]]} are NaN or infinite: {cause}.")


@dataclass(frozen=True)
class EmbeddingFolder:
    """Embeddings that `write_embeddings` wrote, read back.

    Attributes:
        path: The folder.
        settings: What they were made with: model, revision, weights, data, split and sizes.
        embeddings: float32 (images, dim), rows of length 1.
        rows: int64 (images,), which row of the data each is; broken images are left out.
        names: (images,) file names, or row numbers where the images have none.
        columns: person_id, camera_id, track_id of each image, those that the data have; as `id_columns` gives them.
    """

    path: Path
    settings: dict[str, Any]
    embeddings: np.ndarray
    rows: np.ndarray
    names: list[str]
    columns: dict[str, np.ndarray]

    @property
    def weights(self) -> str:
        """Fingerprint of the model that made them."""
        return self.settings["weights"]

    def require_model(self, fingerprint: str) -> None:
        """Raises ValueError if embeddings of a model with this fingerprint can't be compared with these."""
        if fingerprint != self.weights:
            raise ValueError(
                f"{self.path} was made by another model or revision ({self.settings['model']}, {self.weights}) than "
                f"the queries' ({fingerprint}): their distances mean nothing. Embed the gallery again, or search "
                "with its own model."
            )

    def require_images(self, images: datasets.Dataset) -> None:
        """Raises ValueError if the images have changed since they were embedded: their number or their names."""
        told = (
            f"{self.settings['data']} has {len(images)} images now, {self.settings['num_images']} when it was embedded"
        )
        if len(images) != self.settings["num_images"]:
            raise ValueError(f"{told}: embed it again.")
        then = Table.from_pydict({"row": self.rows, "name": self.names})
        changed = first_change(then, describe(images, 0).select(["row", "name"]))
        if changed:
            raise ValueError(f"{told}, but they have changed: {changed}. Embed it again.")


def model_fingerprint(model: PreTrainedModel, processor: BaseImageProcessor) -> str:
    """What tells whether embeddings can be compared: a hash of a model's weights and its processor's settings.

    Returns:
        "sha256:" and 64 digits; the same wherever the checkpoint lies and whatever it is called.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    settings = {name: value for name, value in processor.to_dict().items() if not name.startswith("_")}
    settings.pop("auto_map", None)  # where its code lies doesn't matter
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return f"sha256:{digest.hexdigest()}"


def write_embeddings(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: datasets.Dataset,
    folder: str | os.PathLike,
    source: dict[str, Any],
    shard_images: int = SHARD_IMAGES,
    process_index: int = 0,
    num_processes: int = 1,
    **options: Any,
) -> int:
    """Embeds a data set into a folder, shard by shard; shards that are there already are not made again.

    A shard is `shard-00000.safetensors` (`embeddings`) and `shard-00000.parquet` (row, name, ids); it is written under
    another name and renamed when complete, so that a killed run goes on where it stopped. Before that, names and ids
    of what is there are compared with the data's: pictures that were added, renamed or replaced by others are noticed,
    new content under an old name is not.

    Args:
        model: As in `embed_images`.
        processor: The model's own image processor.
        images: Rows with a column `image`; ids in the columns person_id, camera_id and track_id are kept.
        folder: Where to write.
        source: What to note beside them: `model` and `data`, by the names they were loaded by, and `split`, a name or
            None, as `load_gallery_images` takes it.
        shard_images: Images a shard.
        process_index: This process makes every `num_processes`-th shard, from this one.
        num_processes: How many processes share the work.
        options: Go to `embed_images`.

    Returns:
        The number of shards made now.

    Raises:
        ValueError: The folder holds embeddings of another model, revision or data set, or the data have changed since;
            or as in `embed_images`. Nothing is written unless the first shard succeeds.
        RuntimeError: As in `embed_images`.
        OSError: The folder can't be written; nothing has been embedded then.
    """
    folder = Path(os.path.abspath(folder))  # pyarrow takes a relative cam:3 for an address
    if shard_images < 1:
        raise ValueError(f"`shard_images` must be at least 1, got {shard_images}.")
    missing = {"model", "data", "split"} - source.keys()
    if missing:
        raise ValueError(f"`source` must tell model, data and split; missing: {', '.join(sorted(missing))}.")
    settings = {
        "format": _FORMAT,
        "weights": model_fingerprint(model, processor),
        "revision": getattr(model.config, "_commit_hash", None),
        **source,
        "hidden_size": model.config.hidden_size,
        "num_images": len(images),
        "shard_images": shard_images,
    }
    shards = list(_shards(folder, len(images), shard_images))
    there = [(file, rows) for file, rows in shards if file.is_file()]
    if is_embedded(folder):
        _require_settings(folder, settings)
    elif there:
        raise ValueError(f"{folder} holds shards, but no {SETTINGS_FILE}. Choose another folder, or remove this one.")
    for file, rows in there:  # all of them, before this process writes any
        changed = first_change(read_table(file, rows), describe(images.select(rows), rows.start))
        if changed:
            raise ValueError(
                f"{folder} holds embeddings of {source['data']} as it was: {changed}. Choose another folder, or "
                "remove this one."
            )
    if model.config.num_cameras:
        logger.warning("The model knows cameras, but isn't told them here: queries of a search come from any camera.")
    if len(there) < len(shards):
        require_writable_folder(folder)
    made = 0
    for vectors_file, rows in shards[process_index::num_processes]:
        if vectors_file.is_file():
            continue
        part = images.select(rows)
        embeddings = embed_images(model, processor, part, **options)
        good = np.flatnonzero(~np.isnan(embeddings[:, 0]))
        table = describe(part, rows.start)
        _write_settings(folder, settings)  # not earlier: a model or a setting that doesn't work leaves nothing behind
        with written_aside(vectors_file.with_suffix(".parquet"), overwrite=True) as partial:
            parquet.write_table(table.take(good), partial)
        with written_aside(vectors_file, overwrite=True) as partial:  # last: it says that the shard is complete
            save_file({"embeddings": embeddings[good]}, partial)
        made += 1
    return made


def is_embedded(source: str | os.PathLike) -> bool:
    """Whether this is a folder that `write_embeddings` wrote, and no images."""
    return (Path(source) / SETTINGS_FILE).is_file()


def read_embeddings(folder: str | os.PathLike) -> EmbeddingFolder:
    """Reads what `write_embeddings` wrote.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no embeddings.
        PermissionError: A file of it may not be read.
        ValueError: Shards are missing, damaged or don't fit each other.
    """
    folder = Path(os.path.abspath(folder))  # as in `write_embeddings`
    settings = _read_settings(folder)
    vectors, tables = [], []
    for file, rows in _shards(folder, settings["num_images"], settings["shard_images"]):
        if not file.is_file():
            raise ValueError(f"{folder}: {file.name} is missing; run `personvit embed` again, it goes on from there.")
        if not os.access(file, os.R_OK):  # safetensors would say that there is no such file
            raise PermissionError(f"{file} may not be read by this user: ask its owner for the permission.")
        tables.append(read_table(file, rows))
        try:
            vectors.append(load_file(file)["embeddings"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file}: can't be read ({error}). Remove it and run `personvit embed` again.") from error
        if vectors[-1].dtype != np.float32:
            raise ValueError(
                f"{file}: its embeddings are {vectors[-1].dtype}, not float32. Remove it and embed again."
            )
        if vectors[-1].shape != (len(tables[-1]), settings["hidden_size"]):
            raise ValueError(f"{file}: doesn't fit its .parquet file or {SETTINGS_FILE}. Remove it and embed again.")
    embeddings = np.concatenate(vectors)
    try:
        table = concat_tables(tables, promote_options="permissive")  # older shards without any id tell no type
    except ArrowException as error:
        raise ValueError(f"{folder}: the ids of its shards differ in type ({error}). Embed it again.") from error
    if not np.isfinite(embeddings).all():
        raise ValueError(f"{folder}: its embeddings hold NaN or infinity. Remove its shards and embed again.")
    lengths = np.einsum("ij,ij->i", embeddings, embeddings)
    if (wrong := np.flatnonzero(abs(lengths - 1) > 0.01)).size:
        found = f"row {wrong[0]} has the length {lengths[wrong[0]] ** 0.5:.4g}"
        raise ValueError(f"{folder}: its embeddings should have length 1; {found}. Remove its shards and embed again.")
    try:
        ids = id_columns(table)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    rows, names = table["row"].to_numpy(), table["name"].to_pylist()
    return EmbeddingFolder(folder, settings, embeddings, rows, names, ids)


def _shards(folder: Path, num_images: int, shard_images: int) -> Iterator[tuple[Path, range]]:
    """The file with the vectors of each shard, and the rows of the data that are in it."""
    for shard, start in enumerate(range(0, num_images, shard_images)):
        yield folder / f"shard-{shard:05d}.safetensors", range(start, min(start + shard_images, num_images))


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    if is_embedded(folder):  # settings of another process, or of an earlier run
        return _require_settings(folder, settings)
    with written_aside(folder / SETTINGS_FILE, overwrite=True) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n")


def _require_settings(folder: Path, settings: dict[str, Any]) -> None:
    found = _read_settings(folder)
    # what the model is called and where it came from may differ: its weights tell
    decisive = sorted(set(settings) - {"model", "revision"})
    different = [name for name in decisive if found.get(name) != settings[name]]
    if different:
        raise ValueError(
            f"{folder} holds embeddings with another {', '.join(different)} ({found.get(different[0])}; now "
            f"{settings[different[0]]}). Choose another folder, or remove this one."
        )


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {SETTINGS_FILE} in it; expected a folder that `personvit embed` made.")
    try:
        settings = read_json(file)
        sizes = [settings[name] for name in ("num_images", "shard_images", "hidden_size")]
        good = settings["format"] == _FORMAT and all(type(size) is int and size > 0 for size in sizes)
        good = good and all(isinstance(settings[name], str) for name in ("weights", "model", "data"))
        good = good and isinstance(settings["split"], str | None)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{file}: not the settings of a folder that `personvit embed` made.")
    return settings
