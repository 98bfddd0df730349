"""`personvit show`: pictures of what a model sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cli_common import numbers

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from transformers import BaseImageProcessor, PreTrainedModel

show_app = typer.Typer(no_args_is_help=True, help="Draw what a model sees, as .png, .svg or .pdf.")

Model = Annotated[str, typer.Option(help="Checkpoint folder or Hub name.")]
Out = Annotated[Path, typer.Option(help="Picture to write: .png, .svg or .pdf.")]
Dpi = Annotated[int, typer.Option(help="Dots an inch of a .png.")]
Pictures = Annotated[list[str], typer.Argument(help="Image files, or one data set.")]
Data = Annotated[str, typer.Argument(help="Labelled data set.")]
Split = Annotated[str | None, typer.Option(help="query, gallery or train of a labelled data set.")]
Rows = Annotated[str | None, typer.Option(help="Rows of the data set, such as 0,4,17; default: some evenly.")]
Size = Annotated[
    str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Larger than the model's own shows finer patches.")
]


@show_app.command()
def parts(
    pictures: Pictures,
    model: Model,
    out: Out,
    split: Split = None,
    rows: Rows = None,
    groups: Annotated[int, typer.Option(help="Groups to cluster the patches into.")] = 6,
    image_size: Size = None,
    dpi: Dpi = 300,
) -> None:
    """Cluster the patches of several pictures: which parts of people the model holds for the same (fig. 4)."""
    from .patches import cluster_parts, patch_tokens
    from .visualization import draw_parts

    patches = patch_tokens(*_load(model, out), _images(pictures, split, rows, 6), image_size=_size(image_size))
    _save(draw_parts(patches, cluster_parts(patches.tokens, groups)), out, dpi)


@show_app.command()
def attention(
    pictures: Pictures,
    model: Model,
    out: Out,
    split: Split = None,
    rows: Rows = None,
    layer: Annotated[int, typer.Option(help="Whose attention, from 0; -1 is the last.")] = -1,
    image_size: Size = None,
    dpi: Dpi = 300,
) -> None:
    """Where [CLS] looks, for each head (fig. 5)."""
    from .patches import patch_tokens
    from .visualization import draw_attention

    images = _images(pictures, split, rows, 3)
    _save(draw_attention(patch_tokens(*_load(model, out), images, layer, _size(image_size))), out, dpi)


@show_app.command()
def matches(
    pictures: Pictures,
    model: Model,
    out: Out,
    split: Split = None,
    rows: Rows = None,
    top: Annotated[int, typer.Option(help="The most similar matches to draw.")] = 12,
    image_size: Size = None,
    dpi: Dpi = 300,
) -> None:
    """Which patches of two pictures belong together: mutual nearest ones (fig. 6)."""
    from .patches import match_patches, patch_tokens
    from .visualization import draw_correspondences

    images = _images(pictures, split, rows, 2)
    if len(images) != 2:
        raise ValueError(f"Two pictures are matched, got {len(images)}: name two files, or a data set and --rows A,B.")
    loaded, size = _load(model, out), _size(image_size)
    first, second = (patch_tokens(*loaded, [image], image_size=size) for image in images)
    _save(draw_correspondences(first, second, match_patches(first.tokens[0], second.tokens[0]), top), out, dpi)


@show_app.command()
def occlusion(
    picture: Annotated[str, typer.Argument(help="Image file, or a data set.")],
    model: Model,
    out: Out,
    split: Split = None,
    rows: Rows = None,
    shares: Annotated[str, typer.Option(help="Hidden shares of the picture to try.")] = "0,0.2,0.4,0.6",
    side: Annotated[str, typer.Option(help="Hidden from the bottom, top, left or right.")] = "bottom",
    image_size: Size = None,
    dpi: Dpi = 300,
) -> None:
    """Attention to a person who is hidden more and more, and how much of the feature is left."""
    from .patches import occlude, patch_tokens
    from .visualization import draw_occlusion

    images = _images([picture], split, rows, 1)
    if len(images) != 1:
        raise ValueError(f"One picture is hidden, got {len(images)}: name one of them with --rows.")
    whole = [0.0]  # what the others are compared with
    hidden = whole + [share for share in numbers(shares) if share]
    occluded = [occlude(images[0], share, side) for share in hidden]
    _save(draw_occlusion(patch_tokens(*_load(model, out), occluded, image_size=_size(image_size)), hidden), out, dpi)


@show_app.command()
def retrieval(
    data: Data,
    model: Model,
    out: Out,
    rows: Annotated[str | None, typer.Option(help="Queries, such as 0,4,17; default: some evenly.")] = None,
    num_queries: Annotated[int, typer.Option(help="How many queries, if not named.")] = 6,
    top: Annotated[int, typer.Option(help="Gallery pictures for each.")] = 10,
    dpi: Dpi = 300,
) -> None:
    """Draw the gallery ranked for some queries; right ones, wrong ones and those of the same camera."""
    from .person_images import PersonImages
    from .reid_data import load_reid_dataset
    from .scripting import embed_benchmark
    from .search import rank_benchmark
    from .visualization import draw_rankings

    network, processor = _load(model, out)
    dataset = load_reid_dataset(data, require_train=False)
    chosen = _rows(rows, len(dataset["query"]), num_queries)
    found = rank_benchmark(embed_benchmark(network, processor, dataset), chosen, top)
    queries = PersonImages(dataset["query"])
    _save(draw_rankings([queries[i] for i in chosen], PersonImages(dataset["gallery"]), *found), out, dpi)


@show_app.command()
def map(
    data: Data,
    model: Model,
    out: Out,
    split: Annotated[str, typer.Option(help="query, gallery or train.")] = "gallery",
    method: Annotated[str, typer.Option(help="pca or tsne.")] = "tsne",
    people: Annotated[int, typer.Option(help="People to show, those with most pictures.")] = 12,
    dpi: Dpi = 300,
) -> None:
    """Draw the features in two dimensions, by person and camera."""
    import numpy as np

    from .embedding import embed_images
    from .search import load_gallery_images
    from .visualization import draw_embedding_map

    network, processor = _load(model, out)
    images = load_gallery_images(data, split)
    ids = (np.array(images[column]) for column in ("person_id", "camera_id"))
    _save(draw_embedding_map(embed_images(network, processor, images), *ids, method, people), out, dpi)


def _load(model: str, out: Path) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model, on a GPU if there is one, and its image processor; the name of the picture is checked first."""
    from accelerate import PartialState

    from .loading import load_embedder
    from .visualization import check_figure_name

    check_figure_name(out)
    network, processor = load_embedder(model)
    return network.to(PartialState().device), processor


def _save(figure: Figure, out: Path, dpi: int) -> None:
    from .visualization import save_figure

    save_figure(figure, out, dpi=dpi)
    typer.echo(f"Written to {out}.")


def _size(text: str | None) -> tuple[int, int] | None:
    size = numbers(text, int, "x")
    if size is not None and len(size) != 2:
        raise typer.BadParameter(f"{text!r} is not HEIGHTxWIDTH, such as 256x128.")
    return size and (size[0], size[1])


def _images(sources: list[str], split: str | None, rows: str | None, number: int) -> list[np.ndarray]:
    """Image files as they are named, or rows of one data set: those named, or `number` of them evenly."""
    from .person_images import IMAGE_SUFFIXES, PersonImages, decode_image
    from .search import load_gallery_images

    files = [source for source in sources if source.lower().endswith(IMAGE_SUFFIXES)]
    if len(files) == len(sources):
        if rows is not None or split is not None:
            raise typer.BadParameter("--rows and --split go with a data set, not with image files.")
        return [decode_image(file, file) for file in files]
    if len(sources) > 1:
        raise typer.BadParameter("Give image files, or one data set.")
    data = PersonImages(load_gallery_images(sources[0], split))
    images = [data[i] for i in _rows(rows, len(data), number)]
    for image in images:
        if not hasattr(image, "shape"):
            raise ValueError(image.reason)
    return images


def _rows(text: str | None, length: int, number: int) -> list[int]:
    if text is None:
        number = min(number, length)
        return [round(i * (length - 1) / max(number - 1, 1)) for i in range(number)]
    rows = numbers(text, int)
    if not all(0 <= row < length for row in rows):
        raise ValueError(f"--rows must lie in [0, {length - 1}], got {text}.")
    return rows
