"""The `personvit` command, for people who don't train: convert weights, embed pictures, evaluate, search, export."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


class Runtime(str, Enum):
    """What a model can be exported to."""

    vit = "vit"
    timm = "timm"
    onnx = "onnx"
    torch = "torch"


def _numbers(text: str | None, kind: type = float, separator: str = ",") -> list | None:
    """The numbers of an option such as 0.5,0.5,0.5 or 256x128."""
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(separator)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not {kind.__name__} numbers with {separator!r} between.") from None


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

    overrides = {
        "num_attention_heads": num_attention_heads,
        "image_size": _numbers(image_size, int, "x"),
        "patch_stride": patch_stride,
        "num_cameras": num_cameras,
        "num_views": num_views,
        "side_information_scale": side_information_scale,
        "layer_norm_eps": layer_norm_eps,
        "image_mean": _numbers(image_mean),
        "image_std": _numbers(image_std),
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if to == "official":
        if overrides or (target, kind) != ("auto", "auto"):
            raise typer.BadParameter("--to official takes no other options: the folder tells all.")
        _convert_to_official(source, output)
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


def _convert_to_official(folder: Path, file: Path) -> None:
    from .official_format import load_own_model, save_official_checkpoint

    model = load_own_model(folder)
    save_official_checkpoint(model, file)
    typer.echo(f"{type(model).__name__} of {folder} written to {file}.")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Folder (vit, timm) or file (.onnx, .pt2) to write.")],
    to: Annotated[Runtime, typer.Option(help="Plain transformers ViT, timm, ONNX or a torch.export program.")],
    half: Annotated[bool, typer.Option("--half", help="float16; onnx and torch still take and give float32.")] = False,
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
        raise ValueError(f"--to {to.value} takes no {' or '.join(unused)}.")
    from . import export as exporters

    write = getattr(exporters, f"export_{to.value}")
    loaded, processor = exporters.load_for_export(model, revision)
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


def main() -> None:
    """Runs the command; what is wrong with its input is told in one line on standard error, and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"personvit: {error}", err=True)
        sys.exit(1)
