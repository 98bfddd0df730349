"""The `personvit` command, for people who don't train: convert weights, embed pictures, evaluate, search, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


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
    except (ValueError, OSError) as error:
        typer.echo(f"personvit: {error}", err=True)
        sys.exit(1)
