"""`personvit data`: data sets made ready."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_common import absolute, printable_lines

data_app = typer.Typer(no_args_is_help=True, help="Get data sets ready.")


@data_app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="Name of a benchmark or luperson (with --root), or folder or archive.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the parquet files; a run that was cut off goes on in it.")],
    root: Annotated[Path | None, typer.Option(help="Where the benchmark's folder or archive is.")] = None,
    shard_images: Annotated[int, typer.Option(help="Images a parquet file.")] = 10_000,
) -> None:
    """Turn a folder or archive into parquet files that load_dataset reads, and report what became of each file."""
    from .preparing import prepare_dataset

    report = prepare_dataset(source, out, root, shard_images=shard_images, progress=sys.stderr.isatty())
    typer.echo(printable_lines(f"{out}: {report}"))


@data_app.command()
def select(
    data: Annotated[str, typer.Argument(help="What `--data` of examples/pretrain.py takes, but for an index.")],
    out: Annotated[Path, typer.Option(help="Index to write, *.parquet; give it to --data in place of the data.")],
    by: Annotated[str, typer.Option(help="cfs (catastrophic forgetting score) or random.")] = "cfs",
    keep: Annotated[float, typer.Option(help="Largest share of the images to keep.")] = 0.5,
    generic: Annotated[
        str | None, typer.Option(help="For cfs: the model before; a checkpoint, or a folder of `personvit embed`.")
    ] = None,
    adapted: Annotated[str | None, typer.Option(help="The same model, fine-tuned on people.")] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(help="Leave out what is so similar to another, such as 0.95 (cosine around the mean)."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random choice.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 64,
    num_workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    max_broken_share: Annotated[float, typer.Option(help="Largest share of broken images in a shard.")] = 0.01,
) -> None:
    """Choose images to pre-train on: an index of rows and scores, nothing copied."""
    from .person_images import load_person_images, require_no_index
    from .selection import check_index, check_rules, select_images, write_selection

    models = {role: name for role, name in (("generic", generic), ("adapted", adapted)) if name is not None}
    check_rules(by, keep, generic, adapted, near_duplicates)
    for name in models.values():
        _require_model(name)
    check_index(out)
    require_no_index(data)
    data = absolute(data)
    images = load_person_images(data)
    options = {"batch_size": batch_size, "num_workers": num_workers, "max_broken_share": max_broken_share}
    options["progress"] = sys.stderr.isatty()
    folders = {
        role: _embedded(name, images, data, out.with_suffix(f".{role}"), **options) for role, name in models.items()
    }
    selection = select_images(len(images), by, keep, near_duplicate=near_duplicates, seed=seed, **folders)
    settings = {"by": by, "keep": keep, "near_duplicates": near_duplicates, "seed": seed}
    settings |= {role: folder.weights for role, folder in folders.items()}
    write_selection(selection, out, data, settings)
    typer.echo(f"{out}: {selection}.")


@data_app.command("from-video")
def from_video(
    videos: Annotated[list[Path], typer.Argument(help="Video files.")],
    out: Annotated[Path, typer.Option(help="Folder for the crops; a run that was cut off goes on in it.")],
    boxes: Annotated[
        list[Path] | None, typer.Option(help="MOT file or a detector's JSON, one for each video; default: detect.")
    ] = None,
    detector: Annotated[
        str, typer.Option(help="Of torchvision, which fetches its weights.")
    ] = "fasterrcnn_mobilenet_v3_large_320_fpn",
    detector_weights: Annotated[Path | None, typer.Option(help="File with its weights (.pth), when offline.")] = None,
    stride: Annotated[int, typer.Option(help="Of how many frames the detector looks at one.")] = 1,
    min_score: Annotated[
        float | None, typer.Option(help="Smallest score of a box; 0.5 for the detector, any for files.")
    ] = None,
    min_height: Annotated[float, typer.Option(help="Smallest height of a box in pixels.")] = 64,
    max_occlusion: Annotated[
        float, typer.Option(help="Largest share of a box under that of somebody in front.")
    ] = 0.4,
    min_sharpness: Annotated[float, typer.Option(help="Smallest variance of the crop's Laplacian at 128x64.")] = 30,
    min_track_boxes: Annotated[int, typer.Option(help="Boxes a track must have.")] = 5,
    every: Annotated[int, typer.Option(help="Frames between two crops of a track.")] = 5,
    blur_heads: Annotated[
        bool, typer.Option("--blur-heads", help="Blur the upper 30% of each crop, where faces are.")
    ] = False,
) -> None:
    """Cut the people out of videos: tracked, filtered, as parquet files that pre-training takes."""
    from .tracks import CropRules
    from .video import DETECTOR_SCORE, crops_from_videos

    if min_score is None and not boxes:
        min_score = DETECTOR_SCORE
    rules = CropRules(
        min_score=min_score,
        min_height=min_height,
        max_occlusion=max_occlusion,
        min_sharpness=min_sharpness,
        min_track_boxes=min_track_boxes,
        every=every,
    )
    report = crops_from_videos(
        videos,
        out,
        boxes or None,
        detector,
        detector_weights,
        stride,
        rules,
        blur_heads,
        progress=sys.stderr.isatty(),
    )
    typer.echo(printable_lines(f"{out}: {report}"))


def _require_model(name: str) -> None:
    """Stops before long work if there are no such features and no such checkpoint."""
    from .embedding import is_embedded
    from .loading import read_config

    if not is_embedded(name):
        read_config(name)


def _embedded(name: str, images: Any, data: str, folder: Path, **options: Any) -> Any:
    """The features in a folder of `personvit embed`; or those of a checkpoint, made in `folder`."""
    from .embedding import is_embedded, read_embeddings, write_embeddings
    from .loading import load_embedder

    if is_embedded(name):
        folder = read_embeddings(name)
        folder.require_images(images)
        return folder
    from accelerate import PartialState

    network, processor = load_embedder(name)
    source = {"model": absolute(name), "data": data, "split": None}
    write_embeddings(network.to(PartialState().device), processor, images, folder, source, **options)
    return read_embeddings(folder)
