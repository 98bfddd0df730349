"""`personvit app`: drop a picture of a person, see the ranked gallery and what the model sees. Nothing is kept.

Requests name models and galleries by the names they were given at the start, never by paths.
"""

from __future__ import annotations

import html
import io
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState

from .app_page import (
    MAX_UPLOAD_BYTES,
    PICKER_SCRIPT,
    PICKER_TEMPLATE,
    STYLE,
    Gate,
    RequestError,
    drawings_html,
    problem_html,
    read_picture,
    results_html,
    thumbnail,
)
from .embedding import embed_images, is_embedded, model_fingerprint, read_embeddings
from .embedding_tables import KEPT_ID_COLUMNS, id_columns
from .extras import require
from .loading import load_embedder, read_config
from .patches import PatchTokens, cluster_parts, match_patches, patch_tokens
from .person_images import BrokenImage, PersonImages, resolve_source
from .search import ExactIndex, load_gallery_images
from .visualization import draw_attention, draw_correspondences, draw_parts

logger = logging.getLogger(__name__)

MAX_TOP = 50
_NUM_EXAMPLES, _NUM_EXPLAINED, _NUM_PARTS, _MOST_HEADS, _DPI = 6, 3, 6, 4, 150
_PATCHES_HEIGHT = 256  # smaller models are shown larger pictures: four columns of patches tell little


class _Model:
    """A checkpoint, loaded when first asked for."""

    def __init__(self, path: str):
        self.path = path

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and image processor; on a GPU if there is one."""
        model, processor = load_embedder(self.path)
        return model.to(PartialState().device), processor

    def patches(self, images: list[np.ndarray]) -> PatchTokens:
        """Patches of pictures of any size, finer than in a search if that is coarse; the features are a search's."""
        model, processor = self.loaded
        height, width = processor.size["height"], processor.size["width"]
        scale = max(1, round(_PATCHES_HEIGHT / height))
        patches = patch_tokens(model, processor, images, image_size=(scale * height, scale * width))
        return replace(patches, embeddings=embed_images(model, processor, images))


@dataclass(frozen=True)
class _Gallery:
    """Pictures that are searched, and their features."""

    pictures: PersonImages
    rows: np.ndarray
    names: list[str]
    index: ExactIndex


class PersonFinder:
    """What the app answers with: models and galleries by name.

    Args:
        models: {name: checkpoint folder or Hub name}.
        galleries: {name: folder that `personvit embed` made, or images: a folder, parquet, a labelled data set}.
            Images are embedded when they are first searched, by each model.

    Raises:
        ValueError: There is no model, or no gallery, or a checkpoint is none of ours; or a gallery's embeddings are
            damaged or not finished.
        FileNotFoundError: There is no such checkpoint or gallery.
        PermissionError: A gallery's embeddings may not be read.
    """

    def __init__(self, models: Mapping[str, str], galleries: Mapping[str, str]):
        if not models or not galleries:
            raise ValueError("The app needs at least one model and one gallery.")
        for path in models.values():
            read_config(path)
        for source in galleries.values():
            resolve_source(source)
            if is_embedded(source):
                read_embeddings(source)  # what is wrong with it is told now, and not to those who search
        self.models = {name: _Model(path) for name, path in models.items()}
        self.galleries = dict(galleries)
        # one request at a time: drawing switches the model's attention, and the first one fills the caches
        self.lock = Lock()
        self.gallery = cache(self._gallery)

    def examples(self) -> list[tuple[np.ndarray, str]]:
        """Pictures to try, and who they show: queries of the first labelled gallery, evenly; none without labels."""
        for source in self.galleries.values():
            if not is_embedded(source) and (queries := _labelled(source, "query")) is not None:
                pictures = PersonImages(queries)
                chosen = np.linspace(0, len(pictures) - 1, min(_NUM_EXAMPLES, len(pictures))).round().astype(int)
                columns = _columns(queries)
                found = [(pictures[i], _caption(columns, i, ", ")) for i in chosen]
                return [(picture, name) for picture, name in found if not isinstance(picture, BrokenImage)]
        return []

    def search(self, picture: Any, model: Any, gallery: Any, top: Any) -> Iterator[tuple[str, str]]:
        """Yields the ranked gallery, then the same and the explanations, as HTML; or what is wrong with the request.

        Args:
            picture: Data URL of an image file.
            model: A model's name.
            gallery: A gallery's name.
            top: How many to show, 1 to 50.
        """
        try:
            with self.lock:
                chosen = self._model(model)
                if not isinstance(gallery, str) or gallery not in self.galleries:
                    raise RequestError("There is no such gallery.")
                if not isinstance(top, int | float) or not 1 <= top <= MAX_TOP:
                    raise RequestError(f"Show from 1 to {MAX_TOP} pictures.")
                query = read_picture(picture)
                searched = self.gallery(model, gallery)
                shown = self._search(chosen, searched, query, int(top))
        except RequestError as error:
            yield problem_html(str(error)), ""
            return
        ranked = results_html((thumbnail(picture), similarity, name) for picture, similarity, name in shown)
        yield ranked, "Drawing what the model sees …"
        nearest = [picture for picture, _, _ in shown[:_NUM_EXPLAINED]]
        names = ["query", *(f"rank {rank}" for rank in range(1, len(nearest) + 1))]
        with self.lock:
            yield ranked, drawings_html(_drawings(chosen.patches([query, *nearest]), names))

    def compare(self, first: Any, second: Any, model: Any) -> str:
        """How alike two pictures are and which of their patches match, as HTML; or what is wrong.

        Args:
            first: Data URL of an image file.
            second: Data URL of another.
            model: A model's name.
        """
        try:
            with self.lock:
                chosen = self._model(model)
                patches = chosen.patches([read_picture(first), read_picture(second)])
                similarity = float(patches.embeddings[0] @ patches.embeddings[1])
                title = f"<h3>Cosine similarity {similarity:.5f}</h3>"
                return title + self._standing(model, patches) + drawings_html(_drawings(patches, ["first", "second"]))
        except RequestError as error:
            return problem_html(str(error))

    def _standing(self, model: str, patches: PatchTokens) -> str:
        """How the second picture would rank for the first: cosines of fine-tuned features can all lie near 1."""
        name = next(iter(self.galleries))
        try:
            index = self.gallery(model, name).index
        except RequestError:  # embedded by another model
            return ""
        first, second = patches.embeddings
        share = np.mean(index.embeddings @ first < second @ first)
        return f"<p>More similar to the first picture than {share:.0%} of the gallery {html.escape(name)}.</p>"

    def _model(self, name: Any) -> _Model:
        if not isinstance(name, str) or name not in self.models:
            raise RequestError("There is no such model.")
        return self.models[name]

    def _search(self, model: _Model, gallery: _Gallery, query: np.ndarray, top: int) -> list[tuple]:
        """(picture, cosine similarity, name), the most similar first."""
        indices, similarities = gallery.index.search(embed_images(*model.loaded, [query]), top)
        shown = [
            (gallery.pictures[int(gallery.rows[i])], float(similarity), gallery.names[i])
            for i, similarity in zip(indices[0], similarities[0], strict=True)
            if i >= 0
        ]
        return [row for row in shown if not isinstance(row[0], BrokenImage)]

    def _gallery(self, model: str, gallery: str) -> _Gallery:
        loaded = self.models[model].loaded
        try:
            return self._read_gallery(loaded, self.galleries[gallery])
        except RequestError:
            raise
        except (OSError, ValueError) as error:  # such as pictures that were moved; it tells paths
            logger.warning("The gallery %s can't be searched: %s", gallery, error)
            raise RequestError("This gallery can't be read: the server's log tells why.") from error

    def _read_gallery(self, loaded: tuple[Any, Any], source: str) -> _Gallery:
        network, processor = loaded
        if is_embedded(source):
            folder = read_embeddings(source)
            if folder.weights != model_fingerprint(network, processor):
                raise RequestError("This gallery was embedded by another model: choose that one.")
            pictures = load_gallery_images(folder.settings["data"], folder.settings["split"])
            try:
                folder.require_images(pictures)
            except ValueError as error:
                raise RequestError("This gallery's pictures have changed since it was embedded.") from error
            names = [_caption(folder.columns, i) or Path(name).name for i, name in enumerate(folder.names)]
            return _Gallery(PersonImages(pictures), folder.rows, names, ExactIndex(folder.embeddings, {}))
        pictures = _labelled(source, "gallery")
        if pictures is None:
            pictures = load_gallery_images(source, None)
        embeddings = embed_images(network, processor, pictures, max_broken_share=1.0)
        rows = np.flatnonzero(~np.isnan(embeddings[:, 0]))
        if not rows.size:
            raise RequestError("No picture of this gallery can be read.")
        columns = _columns(pictures)
        names = [_caption(columns, i) or f"picture {i}" for i in rows]
        return _Gallery(PersonImages(pictures), rows, names, ExactIndex(embeddings[rows], {}))


def named_sources(texts: list[str]) -> dict[str, str]:
    """Names that the page shows for sources given as NAME=PATH or PATH: then the last part of the path.

    A text that is a path as a whole is one, also with "=" in it.

    Raises:
        ValueError: Two have the same name.
    """
    sources: dict[str, str] = {}
    for text in texts:
        name, is_named, path = text.partition("=")
        if not is_named or Path(text).exists():
            name, path = Path(text).name or text, text
        if name in sources:
            raise ValueError(f"Two sources are called {name}: name them as NAME={path}.")
        sources[name] = path
    return sources


def build_app(finder: PersonFinder) -> Any:
    """The page, a `gradio.Blocks`; `launch_app` serves it."""
    gr = _gradio()
    examples = [{"address": thumbnail(image), "name": name} for image, name in finder.examples()]
    models, galleries = list(finder.models), list(finder.galleries)

    def picker(label: str, name: str) -> Any:
        return gr.HTML(
            value="",
            label=label,
            html_template=PICKER_TEMPLATE,
            js_on_load=PICKER_SCRIPT,
            elem_id=name,
            examples=examples,
            megabytes=MAX_UPLOAD_BYTES // 2**20,
            problem="",
            name="",
        )

    def choice(names: list[str], label: str, name: str) -> Any:
        several = len(names) > 1
        return gr.Dropdown(names, value=names[0], label=label, visible=several, min_width=120, elem_id=name)

    with gr.Blocks(title="PersonViT", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Find a person again\nPictures stay in this server's memory for the moment of a search: nothing is "
            "kept. Search only for people who agreed to it."
        )
        with gr.Tab("Search"), gr.Row():
            with gr.Column(scale=1, min_width=280):
                query = picker("A picture of a person", "query")
                with gr.Row():
                    model = choice(models, "Model", "model")
                    gallery = choice(galleries, "Gallery", "gallery")
                top = gr.Slider(1, MAX_TOP, value=10, step=1, label="Pictures to show")
            with gr.Column(scale=3, min_width=280):
                results = gr.HTML("Choose a picture.", elem_id="results")
                explanations = gr.HTML(elem_id="explanations")
        with gr.Tab("Compare two"):
            with gr.Row():
                with gr.Column(min_width=280):
                    first = picker("The first picture", "first")
                with gr.Column(min_width=280):
                    second = picker("The second picture", "second")
            compared_by = choice(models, "Model", "compared_by")
            comparison = gr.HTML("Choose two pictures.", elem_id="comparison")
        # a choice made while the last one is being answered counts, too
        limits = {"concurrency_limit": 1, "concurrency_id": "model", "trigger_mode": "always_last"}

        def search(picture, model, gallery, top):  # nothing chosen yet is no mistake
            yield from finder.search(picture, model, gallery, top) if picture else [("Choose a picture.", "")]

        def compare(first, second, model):
            return finder.compare(first, second, model) if first and second else "Choose two pictures."

        changed = [query.upload, model.change, gallery.change, top.release]
        gr.on(changed, search, [query, model, gallery, top], [results, explanations], api_name="search", **limits)
        changed = [first.upload, second.upload, compared_by.change]
        gr.on(changed, compare, [first, second, compared_by], comparison, api_name="compare", **limits)
    return blocks


def launch_app(finder: PersonFinder, host: str = "127.0.0.1", port: int | None = None, block: bool = True) -> Any:
    """Serves the app until it is interrupted.

    Args:
        finder: What it answers with.
        host: Address to listen at; the default can be reached from this machine alone, "0.0.0.0" from everywhere.
        port: 7860, or the next free one, if not given.
        block: Whether to return only when it ends.

    Returns:
        The `gradio.Blocks`, which still runs if `block` is false.

    Raises:
        ImportError: Gradio is not installed.
        OSError: The port is not free.
    """
    from starlette.middleware import Middleware

    blocks = build_app(finder)
    blocks.queue(max_size=32).launch(
        server_name=host,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        css=STYLE,
        show_error=False,
        prevent_thread_lock=True,
        enable_monitoring=False,
        run_history=False,  # else the visitor's browser keeps each picture
        footer_links=[],
        app_kwargs={"middleware": [Middleware(Gate)]},
    )
    if block:
        blocks.block_thread()
    return blocks


def _drawings(patches: PatchTokens, names: list[str]) -> list[tuple[str, bytes]]:
    """Attention and parts of all pictures, and the matches of the first two; as JPEG files under captions."""
    heads = patches.attention.shape[1] <= _MOST_HEADS
    caption = "Attention of [CLS]" + (", mean and each head" if heads else "") + " (×: peak against an even spread)"
    drawings = [(caption, draw_attention(patches, heads, names))]
    points = len(np.unique(patches.tokens.reshape(-1, patches.tokens.shape[-1]), axis=0))
    if points >= 2:
        parts = cluster_parts(patches.tokens, min(_NUM_PARTS, points))
        drawings.append(("Patches of similar features, clustered", draw_parts(patches, parts, names)))
    if len(patches.images) > 1:
        first, second = patches.only(0), patches.only(1)
        matches = match_patches(first.tokens[0], second.tokens[0])
        caption = f"Patches that are each other's most similar: {names[0]} and {names[1]}"
        drawings.append((caption, draw_correspondences(first, second, matches)))
    contents = []
    for caption, figure in drawings:
        file = io.BytesIO()
        figure.savefig(file, format="jpeg", dpi=_DPI, pil_kwargs={"quality": 90})
        contents.append((caption, file.getvalue()))
    return contents


def _labelled(source: str, split: str) -> datasets.Dataset | None:
    """A split of a labelled data set with undecoded images; None if it is none."""
    try:
        return load_gallery_images(source, split)
    except ValueError:
        return None


def _columns(pictures: datasets.Dataset) -> dict[str, np.ndarray]:
    names = [name for name in KEPT_ID_COLUMNS if name in pictures.column_names]
    return id_columns(pictures.select_columns(names).with_format("arrow")[:]) if names else {}


def _caption(columns: Mapping[str, np.ndarray], row: int, separator: str = "\n") -> str:
    """Who it is and where, as far as it is known."""
    known = {name: values[row] for name, values in columns.items() if values[row] is not None}
    return separator.join(f"{name.removesuffix('_id')} {value}" for name, value in known.items())


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    require("gradio", "app")
    import gradio

    return gradio
