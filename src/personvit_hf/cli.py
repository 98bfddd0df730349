"""The `personvit` command, for people who don't train: convert weights, embed pictures, evaluate, search, export."""

from __future__ import annotations

import re
import sys
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from .cli_common import absolute, numbers, printable_lines
from .cli_data import data_app
from .cli_show import show_app
from .files import printable


class _Commands(typer.core.TyperGroup):
    """Refuses empty arguments: `Path` makes the current folder of them, and no option has a use for them."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        for before, argument in pairwise(["personvit", *args]):
            if not argument or re.fullmatch("--[a-z-]+=", argument):
                place = argument.rstrip("=") or before
                raise typer.BadParameter(f"What stands after {place} is empty. Is a variable not set?")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__
)


class Runtime(str, Enum):
    """What a model can be exported to."""

    vit = "vit"
    timm = "timm"
    onnx = "onnx"
    torch = "torch"


app.add_typer(data_app, name="data")
app.add_typer(show_app, name="show")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint: a .pth, .bin or .safetensors file, or a folder.")],
    output: Annotated[Path, typer.Argument(help="Folder for model and image processor; a file with --to official.")],
    to: Annotated[
        str, typer.Option(help="ours, or official: from a folder of ours back to an official file.")
    ] = "ours",
    target: Annotated[str, typer.Option(help="auto, backbone, pretraining or reid.")] = "auto",
    kind: Annotated[
        str, typer.Option(help="auto, or what the file is: pretraining, reid, backbone, timm, transformers.")
    ] = "auto",
    num_attention_heads: Annotated[int | None, typer.Option(help="Hidden size / 64 if not given.")] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HEIGHTxWIDTH", help="Such as 256x128; resizes positions of another grid.")
    ] = None,
    patch_stride: Annotated[int | None, typer.Option(help="Pixels between overlapping patches.")] = None,
    num_cameras: Annotated[int | None, typer.Option(help="Of SIE; told by the file unless it has views.")] = None,
    num_views: Annotated[int | None, typer.Option(help="Of SIE.")] = None,
    side_information_scale: Annotated[float | None, typer.Option(help="Factor of SIE: 3.0 if not given.")] = None,
    layer_norm_eps: Annotated[float | None, typer.Option(help="Told by the kind if not given.")] = None,
    image_mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Told by the kind if not given.")] = None,
    image_std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Told by the kind if not given.")] = None,
) -> None:
    """Convert a checkpoint of PersonViT, iBOT, DINO, TransReID(-SSL), PASS, timm or transformers for AutoModel."""
    from .conversion import convert_with_report, save_conversion
    from .official_format import convert_to_official

    overrides = {
        "num_attention_heads": num_attention_heads,
        "image_size": numbers(image_size, int, "x"),
        "patch_stride": patch_stride,
        "num_cameras": num_cameras,
        "num_views": num_views,
        "side_information_scale": side_information_scale,
        "layer_norm_eps": layer_norm_eps,
        "image_mean": numbers(image_mean),
        "image_std": numbers(image_std),
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if to == "official":
        if overrides or (target, kind) != ("auto", "auto"):
            raise typer.BadParameter("--to official takes no other options: the folder tells all.")
        for line in convert_to_official(source, output):
            typer.echo(line)
        return
    if to != "ours":
        raise typer.BadParameter(f"--to should be ours or official, got {to!r}.")
    conversion = convert_with_report(source, target, kind=kind, **overrides)
    save_conversion(conversion, output)
    typer.echo(f"{type(conversion.model).__name__} of {source} ({conversion.kind}) written to {output}.")
    for reason in sorted(set(conversion.left_out.values())):
        keys = [key for key, value in conversion.left_out.items() if value == reason]
        shown = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
        typer.echo(f"Left out: {shown} ({reason}).")
    for note in conversion.notes:
        typer.echo(f"Note: {note}.")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder (vit, timm) or file (.onnx, .pt2) to write.")],
    to: Annotated[Runtime, typer.Option(help="Plain transformers ViT, timm, ONNX or a torch.export program.")],
    half: Annotated[bool, typer.Option("--half", help="16-bit weights; onnx and torch compute in float32.")] = False,
    normalize: Annotated[
        bool | None, typer.Option(help="Embeddings of length 1 (onnx and torch; the default there).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="The only batch size (onnx and torch); any by default.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 18 (the default) or later.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a checkpoint's feature extractor for a runtime that needs this package no more."""
    given = {"normalize": normalize, "batch_size": batch, "opset": opset}
    given = {name: value for name, value in given.items() if value is not None}
    takes = {Runtime.onnx: {"normalize", "batch_size", "opset"}, Runtime.torch: {"normalize", "batch_size"}}
    unused = sorted(given.keys() - takes.get(to, set()))
    if unused:
        flags = " or ".join(f"--{name.removesuffix('_size')}" for name in unused)
        raise ValueError(f"--to {to.value} takes no {flags}.")
    import torch

    from . import export as exporters
    from .loading import load_embedder

    write = getattr(exporters, f"export_{to.value}")
    loaded, processor = load_embedder(model, revision, torch.float32)
    write(loaded, processor, output, half=half, overwrite=overwrite, **given)
    typer.echo(f"{type(loaded).__name__} of {model} written to {output} for {to.value}.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a model and its image processor.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub; created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    license: Annotated[str, typer.Option(help="Licence of the weights; other: the training data's terms.")] = "other",
) -> None:
    """Publish a model with its image processor, card and code on the Hub, in one commit."""
    from .hub import push_to_hub

    typer.echo(push_to_hub(folder, repo_id, private=private or None, license=license).commit_url)


@app.command()
def embed(
    data: Annotated[str, typer.Argument(help="Folder of images, parquet, a Market-1501 tree or a Hub data set.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub name.")],
    out: Annotated[Path, typer.Option(help="Folder for the embeddings; a run that was cut off goes on in it.")],
    split: Annotated[str | None, typer.Option(help="query, gallery or train of labelled data; keeps ids.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 64,
    num_workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    shard_images: Annotated[int, typer.Option(help="Images a shard.")] = 4096,
    max_broken_share: Annotated[float, typer.Option(help="Largest share of broken images in a shard.")] = 0.01,
) -> None:
    """Embed images into a folder; on several processes by `accelerate launch $(which personvit) embed`."""
    from accelerate import Accelerator

    from .distributed import require_connected
    from .embedding import write_embeddings
    from .loading import load_embedder
    from .search import load_gallery_images

    # PartialState would not see that several processes on a CPU belong together
    state = Accelerator()
    require_connected(state)
    # absolute, for a search from another folder
    model, data = absolute(model), absolute(data)
    network, processor = load_embedder(model)
    images = load_gallery_images(data, split)
    made = write_embeddings(
        network.to(state.device),
        processor,
        images,
        out,
        {"model": model, "data": data, "split": split},
        shard_images,
        state.process_index,
        state.num_processes,
        batch_size=batch_size,
        num_workers=num_workers,
        max_broken_share=max_broken_share,
    )
    state.wait_for_everyone()
    typer.echo(f"{out}: {made} shards made by process {state.process_index} of {state.num_processes}.")


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help="Labelled data set with query and gallery.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hub name.")],
    rerank: Annotated[bool, typer.Option(help="Score k-reciprocal re-ranking (20, 6, 0.3) instead.")] = False,
    expand: Annotated[int, typer.Option(help="Average each query with so many of its nearest first.")] = 0,
    remove_camera_bias: Annotated[bool, typer.Option(help="Subtract each camera's mean first.")] = False,
    use_cameras: Annotated[bool, typer.Option(help="Tell a model that was trained with cameras each image's.")] = True,
    bootstrap: Annotated[int, typer.Option(help="Resamples of the identities for 95% intervals.")] = 0,
    camera_pairs: Annotated[bool, typer.Option(help="Figures for each two cameras, too.")] = False,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = 64,
    num_workers: Annotated[int, typer.Option(help="Processes that load images.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for the figures.")] = None,
) -> None:
    """Score a model on a labelled benchmark: mAP, mINP and CMC under the Market-1501 protocol."""
    import json

    from accelerate import Accelerator

    from .distributed import require_connected
    from .files import require_writable
    from .loading import load_embedder
    from .reid_data import load_reid_dataset, require_true_match
    from .scripting import score

    accelerator = Accelerator()
    require_connected(accelerator)
    network, processor = load_embedder(model)
    dataset = load_reid_dataset(data, require_train=False)
    require_true_match(dataset, data)
    if output:
        require_writable(output)
    figures = score(
        network.to(accelerator.device),
        processor,
        dataset,
        use_cameras,
        batch_size,
        num_workers,
        accelerator=accelerator,
        reranked=rerank,
        expand=expand,
        remove_bias=remove_camera_bias,
        bootstrap=bootstrap,
        camera_pairs=camera_pairs,
    )
    if not accelerator.is_main_process:
        return
    typer.echo(f"{model} on {data}: {figures['num_valid_queries']} of {figures['num_queries']} queries have a match")
    _print_figures(figures)
    if output:
        plain = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in figures.items()}
        output.write_text(json.dumps(plain, indent=2) + "\n")


def _print_figures(figures: dict) -> None:
    intervals = figures.get("confidence_intervals", {})
    for name in ("mAP", "mINP", "rank1", "rank5", "rank10"):
        interval = "  [{:.2f}, {:.2f}]".format(*(100 * edge for edge in intervals[name])) if name in intervals else ""
        typer.echo(f"{name:>7} {100 * figures[name]:6.2f}{interval}")
    for row in figures.get("by_camera_pair", ()):
        _print_part(f"cameras {row['query_camera']} -> {row['gallery_camera']}", row)
    for name, rows in figures.get("by_group", {}).items():
        for row in rows:
            _print_part(f"{name} {row[name]}", row)


def _print_part(title: str, row: dict) -> None:
    scores = f"mAP {100 * row['mAP']:.2f}, rank1 {100 * row['rank1']:.2f}"
    typer.echo(f"{title}: {scores}, {row['num_valid_queries']} queries")


@app.command()
def search(
    gallery: Annotated[Path, typer.Option(help="Folder that `personvit embed` made.")],
    query: Annotated[list[Path], typer.Option(help="Picture to search for; may be given several times.")],
    model: Annotated[str | None, typer.Option(help="Checkpoint; default: the one noted in the gallery.")] = None,
    top: Annotated[int, typer.Option(help="How many to show for each query.")] = 10,
    index: Annotated[str, typer.Option(help="exact, or faiss's flat, ivfpq or hnsw, or qdrant.")] = "exact",
    qdrant_url: Annotated[
        str | None,
        typer.Option(help="Qdrant server, such as http://localhost:6333 (key: QDRANT_API_KEY); default: in memory."),
    ] = None,
    camera: Annotated[
        list[int] | None, typer.Option(help="Only these cameras, by camera_id: it counts from 0, c1 is 0.")
    ] = None,
    not_camera: Annotated[list[int] | None, typer.Option(help="Not these cameras, counted in the same way.")] = None,
    track: Annotated[list[int] | None, typer.Option(help="Only these tracks.")] = None,
    not_track: Annotated[list[int] | None, typer.Option(help="Not these tracks.")] = None,
    draw: Annotated[Path | None, typer.Option(help="Picture of the results to write.")] = None,
) -> None:
    """Find the gallery images most like a query."""
    from accelerate import PartialState

    from .embedding import embed_images, model_fingerprint, read_embeddings
    from .loading import load_embedder
    from .search import draw_results, open_index

    folder = read_embeddings(gallery)
    model = model or folder.settings["model"]
    network, processor = load_embedder(model)
    folder.require_model(model_fingerprint(network, processor))
    vectors = embed_images(network.to(PartialState().device), processor, query)
    searched = open_index(folder, index, qdrant_url)
    where = {"camera_id": camera, "track_id": track}
    exclude = {"camera_id": not_camera, "track_id": not_track}
    where, exclude = ({name: values for name, values in f.items() if values} for f in (where, exclude))
    indices, similarities = searched.search(vectors, top, where, exclude)
    nothing = "the filters leave no image of the gallery" if where or exclude else "the gallery holds no image"
    for picture, found, likeness in zip(query, indices, similarities, strict=True):
        typer.echo(f"{picture}" if (found >= 0).any() else f"{picture}: {nothing}")
        for rank, (i, similarity) in enumerate(zip(found, likeness, strict=True), start=1):
            if i >= 0:
                ids = "".join(f"  {name} {of[i]}" for name, of in folder.columns.items() if of[i] is not None)
                typer.echo(printable(f"{rank:>4}  {similarity:.4f}  {folder.names[i]}{ids}"))
    if draw:
        draw_results(query, folder, indices, draw)


@app.command("app")
def serve(
    model: Annotated[list[str], typer.Option(help="Checkpoint; may be given several times, as NAME=PATH too.")],
    gallery: Annotated[
        list[str],
        typer.Option(help="Images, a labelled data set, or a folder that `personvit embed` made; as NAME=PATH too."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="7860 or the next free one if not given.")] = None,
) -> None:
    """Serve a page that searches a gallery for a person and shows what the model sees."""
    from .app import PersonFinder, launch_app, named_sources

    blocks = launch_app(PersonFinder(named_sources(model), named_sources(gallery)), host, port, block=False)
    typer.echo(f"Open {blocks.local_url} (Ctrl+C ends it).")
    blocks.block_thread()


def main() -> None:
    """Runs the command; what is wrong with its input is told in one line on standard error, and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.echo(printable_lines(f"personvit: {error}"), err=True)
        sys.exit(1)


if __name__ == "__main__":  # for launchers that take a module
    main()
