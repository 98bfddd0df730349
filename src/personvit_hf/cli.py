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


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Official checkpoint, such as a .pth file.")],
    output: Annotated[Path, typer.Argument(help="Folder that the model and its image processor are written to.")],
    target: Annotated[str, typer.Option(help="auto, backbone, pretraining or reid.")] = "auto",
) -> None:
    """Convert an official checkpoint to a folder that AutoModel loads."""
    from .conversion import convert_checkpoint

    model, processor = convert_checkpoint(file, target)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    typer.echo(f"{type(model).__name__} of {file} written to {output}.")


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


def main() -> None:
    """Runs the command; what is wrong with its input is told in one line on standard error, and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"personvit: {error}", err=True)
        sys.exit(1)
