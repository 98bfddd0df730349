"""A ranked gallery: embeddings from a folder, and the images most like a query, exactly or by an index.

`ExactIndex`, `FaissIndex` and `QdrantIndex` answer the same call, `search(queries, k, where, exclude)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .embedding import EmbeddingFolder
from .embedding_tables import KEPT_ID_COLUMNS
from .extras import require
from .files import read_json
from .person_images import decode_image, load_person_images
from .reid_data import SPLITS, load_reid_dataset
from .visualization import draw_rankings, save_figure

Filter = Mapping[str, Sequence[Any]]

FAISS_KINDS = {"flat": "Flat", "ivfpq": "IVF{cells},PQ{parts}x4fs", "hnsw": "HNSW32"}
# Compressed vectors only tell which so many times k images to compare with the query themselves.
_COMPRESSED_FETCH = 10
_BLOCK_ELEMENTS = 2**24
_COPY_ELEMENTS = 2**20
# Copying an embedding takes as long as products of it with so many queries; those with 1 take as long as those with 3.
_COPY_QUERIES, _LEAST_QUERIES = 8, 3
# Numbers in a request to Qdrant: some 5 MB of JSON, of the 32 MB that a server takes.
_QDRANT_NUMBERS = 2**18
_QDRANT_TIMEOUT = 60  # seconds
_QDRANT_EF = 256


@dataclass(frozen=True)
class ExactIndex:
    """All similarities, by matrix products in blocks; nothing to build.

    Attributes:
        embeddings: float32 (gallery, dim), rows of length 1.
        columns: What is known of each gallery image, by name; filters name these columns.
    """

    embeddings: np.ndarray
    columns: Mapping[str, np.ndarray]

    def search(
        self, queries: np.ndarray, k: int, where: Filter | None = None, exclude: Filter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The gallery images most similar to each query.

        Args:
            queries: float32 (queries, dim), rows of length 1.
            k: How many for each; at most as many as the gallery has.
            where: {column: values}; only images with one of the values, in each column named.
            exclude: {column: values}; no image with one of the values.

        Returns:
            int64 (queries, k) gallery indices, most similar first, equal ones by index, -1 where the filters leave no
            more; and float32 (queries, k) cosine similarities, NaN there. Those are summed in float64 and rounded
            once: the same pair has the same similarity in every call.

        Raises:
            ValueError: A filter names a column that there is not or values of another kind than it holds, the widths
                differ, or k is below 1.
        """
        k = _checked_k(k, queries, *self.embeddings.shape)
        kept, gallery = _matching(self.columns, len(self.embeddings), where, exclude), self.embeddings
        columns = None
        if kept is None:
            kept = np.arange(len(gallery))
        elif _COPY_QUERIES * len(kept) < max(len(queries), _LEAST_QUERIES) * (len(gallery) - len(kept)):
            gallery = gallery[kept]
        else:  # products with those left out, too, take less than a copy of these
            columns = kept
        indices = np.full((len(queries), k), -1, np.int64)
        similarities = np.full((len(queries), k), np.nan, np.float32)
        count = min(k, len(kept))
        step = max(1, _BLOCK_ELEMENTS // max(1, len(gallery)))
        for start in range(0, len(queries) if count else 0, step):
            part = slice(start, start + step)
            block = queries[part] @ gallery.T
            if columns is not None:
                block = block.take(columns, axis=1)  # unlike block[:, columns] with rows that lie together
            rows, near = _nearest(block, count, gallery.shape[1])
            near = kept[near]
            exact = _exact_products(queries[part], rows, self.embeddings, near)
            order = np.lexsort((-exact, rows))  # stable: equal ones stay by index
            best = order[np.searchsorted(rows, np.arange(len(block)))[:, None] + np.arange(count)]
            indices[part, :count], similarities[part, :count] = near[best], exact[best]
        return indices, similarities


def _nearest(block: np.ndarray, count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of each float32 product that may be among the `count` largest of its row, in order; NaN may."""
    least = block.max(axis=1) if count == 1 else np.partition(block, -count, axis=1)[:, -count]
    # A float32 scalar product of unit vectors is off by at most width x 2^-24, in whatever order it is summed, and
    # equal rows at different places are summed in different orders. The rest is for rounding.
    margin = np.float32(2 * (width + 16) * 2.0**-24)
    return np.divmod(np.flatnonzero(~(block < (least - margin)[:, None])), block.shape[1])


def _exact_products(queries: np.ndarray, rows: np.ndarray, gallery: np.ndarray, near: np.ndarray) -> np.ndarray:
    """(pairs,) float32 scalar products of `queries[rows]` and `gallery[near]`, summed one by one in float64."""
    products = np.empty(len(rows), np.float32)
    step = max(1, _COPY_ELEMENTS // gallery.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        pair = queries[rows[part]].astype(np.float64), gallery[near[part]].astype(np.float64)
        products[part] = np.einsum("nd,nd->n", *pair)
    return products


class FaissIndex:
    """An index of faiss, held by `datasets`.

    "flat" is exact, "hnsw" a graph; with "ivfpq" compressed vectors choose and the embeddings themselves rank.

    Args:
        folder: The embeddings it is for. It is read from there if it was built before, else built and written there.
        kind: One of the three.

    Raises:
        ImportError: faiss is not installed (`pip install personvit-hf[search]`).
        ValueError: There is no such kind, the folder's index is of other embeddings, or its images are too few.
    """

    def __init__(self, folder: EmbeddingFolder, kind: str):
        if kind not in FAISS_KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(FAISS_KINDS)}, got {kind!r}.")
        require("faiss", "search")
        import faiss

        self.columns = folder.columns
        self.size, self.width = folder.embeddings.shape
        self.to_compare = folder.embeddings if kind == "ivfpq" else None
        # One column, so that `datasets` has as many rows as the index; the vectors stay in the index.
        self.rows = datasets.Dataset.from_dict({"row": np.arange(self.size)})
        file, stamp_file = folder.path / f"index-{kind}.faiss", folder.path / f"index-{kind}.json"
        if "::" in str(file):  # parts file systems to `datasets`, which would write another file
            raise ValueError(f'{file}: there can be no index at a path with "::" in it; rename, or search it "exact".')
        cells = int(2 ** np.round(np.log2(max(1, 2 * np.sqrt(self.size)))))
        parts = self.width // next(part for part in (4, 2, 1) if self.width % part == 0)  # 4 bits each
        factory = FAISS_KINDS[kind].format(cells=cells, parts=parts)
        stamp = {"gallery": _gallery_fingerprint(folder), "factory": factory}
        metric = faiss.METRIC_INNER_PRODUCT
        if kind == "ivfpq":
            # The same order for rows of length 1. Inner products of features in a narrow cone are all but the same:
            # 8-bit tables of them would tell nothing. Distances are told, wherever the cone is.
            metric = faiss.METRIC_L2
            stamp["metric"] = "L2"
        if file.is_file():
            try:
                found = read_json(stamp_file)
            except (OSError, ValueError):  # damaged
                found = None
            if found != stamp:
                raise ValueError(
                    f"{file} is an index of other embeddings, or of another kind ({stamp_file.name} tells {found}; "
                    f"expected {stamp}). Remove it to build it anew."
                )
            self.rows.load_faiss_index("vectors", str(file))
        else:
            if kind == "ivfpq" and self.size < 16:  # values of 4 bits, learnt from the images
                raise ValueError(f'"ivfpq" needs 16 images or more, {folder.path} has {self.size}: search it "exact".')
            self.rows.add_faiss_index_from_external_arrays(
                folder.embeddings,
                "vectors",
                string_factory=factory,
                batch_size=2**16,  # its threads share a batch
                metric_type=metric,
                train_size=min(self.size, 64 * cells) if kind == "ivfpq" else None,
            )
            self.rows.save_faiss_index("vectors", str(file))
            stamp_file.write_text(json.dumps(stamp))
        index = self.rows.get_index("vectors").faiss_index
        if kind == "ivfpq":
            index.nprobe = max(32, index.nlist // 4)
        if kind == "hnsw":
            index.hnsw.efSearch = 512

    def search(
        self, queries: np.ndarray, k: int, where: Filter | None = None, exclude: Filter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `ExactIndex.search`; but for "flat" some of the nearest may be missed."""
        k = _checked_k(k, queries, self.size, self.width)
        kept = _matching(self.columns, self.size, where, exclude)
        wanted = min(k, self.size if kept is None else len(kept))
        fetched = wanted if self.to_compare is None else min(self.size, _COMPRESSED_FETCH * wanted)
        while True:
            result = self.rows.search_batch("vectors", queries, k=max(1, fetched))
            similarities, indices = (np.asarray(part) for part in (result.total_scores, result.total_indices))
            good = indices >= 0 if kept is None else np.isin(indices, kept)
            if fetched >= self.size or (good.sum(axis=1) >= wanted).all():
                break
            fetched = min(self.size, 4 * fetched)  # the filter left too few: look farther
        found = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.nan, np.float32)
        for row, mask in enumerate(good):
            near, likeness = indices[row][mask], similarities[row][mask]
            if self.to_compare is not None:
                likeness = self.to_compare[near] @ queries[row]
                order = np.argsort(-likeness, kind="stable")
                near, likeness = near[order], likeness[order]
            count = min(wanted, near.size)
            found[0][row, :count], found[1][row, :count] = near[:count], likeness[:count]
        return found


class QdrantIndex:
    """A collection of a Qdrant server, for galleries beyond one machine.

    Args:
        client: `qdrant_client.QdrantClient`, such as `QdrantClient(url=...)`; `QdrantClient(":memory:")` for tests.
        name: The collection. It is filled from `folder` if it doesn't exist; a filling that was cut off goes on.
        folder: The embeddings.

    Raises:
        ImportError: qdrant-client is not installed (`pip install personvit-hf[qdrant]`).
        ConnectionError: The server can't be reached, or refuses.
        ValueError: The collection holds other embeddings.
    """

    def __init__(self, client: Any, name: str, folder: EmbeddingFolder):
        require("qdrant_client", "qdrant")
        from qdrant_client import models

        self.client, self.name, self.columns = client, name, folder.columns
        self.size, self.width = folder.embeddings.shape
        self.batch = max(1, _QDRANT_NUMBERS // self.width)
        gallery = _gallery_fingerprint(folder)
        same = models.Filter(must=[models.FieldCondition(key="gallery", match=models.MatchValue(value=gallery))])
        with _qdrant_calls(client):
            if not client.collection_exists(name):
                params = models.VectorParams(size=self.width, distance=models.Distance.COSINE)
                client.create_collection(name, vectors_config=params)
            count = client.count(name).count
            if count > self.size or client.count(name, count_filter=same).count != count:
                raise ValueError(
                    f"Collection {name!r} holds {count} images, of another model or gallery than {folder.path} with "
                    f"{self.size}. Choose another name, or delete the collection."
                )
            if count < self.size:
                # Batches go in one after the other, so that all before the one that was cut off are there.
                self._fill(folder.embeddings, gallery, count // self.batch * self.batch)

    def _fill(self, embeddings: np.ndarray, gallery: str, first: int) -> None:
        """Upserts the images from `first` on."""
        from qdrant_client import models

        for column in (*self.columns, "gallery"):  # strict servers filter by no others
            integers = column in self.columns and isinstance(_example(self.columns[column]), int)
            kind = models.PayloadSchemaType.INTEGER if integers else models.PayloadSchemaType.KEYWORD
            self.client.create_payload_index(self.name, column, kind)
        columns = {column: values.tolist() for column, values in self.columns.items()}
        for start in range(first, len(embeddings), self.batch):  # not in one call: in memory it makes lists of all
            ids = range(start, min(start + self.batch, len(embeddings)))
            payloads = [
                {"gallery": gallery} | {name: values[i] for name, values in columns.items() if values[i] is not None}
                for i in ids
            ]
            vectors = embeddings[ids.start : ids.stop]
            self.client.upload_collection(
                self.name, vectors, payloads, ids, batch_size=self.batch, max_retries=3, wait=True
            )

    def search(
        self, queries: np.ndarray, k: int, where: Filter | None = None, exclude: Filter | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `ExactIndex.search`; approximate as the server is set up.

        Raises:
            ConnectionError: The server can't be reached, or refuses.
            ValueError: As there.
        """
        from qdrant_client import models

        k = _checked_k(k, queries, self.size, self.width)

        def conditions(wanted: Filter | None) -> list:
            return [
                models.FieldCondition(key=column, match=models.MatchAny(any=_wanted(self.columns, column, values)))
                for column, values in (wanted or {}).items()
            ]

        settings = {
            "limit": k,
            "filter": models.Filter(must=conditions(where), must_not=conditions(exclude)),
            "params": models.SearchParams(hnsw_ef=max(_QDRANT_EF, k)),
        }
        found = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), np.nan, np.float32)
        for start in range(0, len(queries), self.batch):
            requests = [
                models.QueryRequest(query=query, **settings) for query in queries[start : start + self.batch].tolist()
            ]
            with _qdrant_calls(self.client):
                responses = self.client.query_batch_points(self.name, requests)
            for row, response in enumerate(responses, start):
                for column, point in enumerate(response.points):
                    found[0][row, column], found[1][row, column] = point.id, point.score
        return found


@contextmanager
def _qdrant_calls(client: Any) -> Iterator[None]:
    """Tells of a server's errors in one line, and where it was looked for; in memory, not of what it leaves out."""
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Local mode|Payload indexes have no effect")
            yield
    except (ApiException, QdrantException) as error:
        told = " ".join(str(error).split()).rstrip(".")
        raise ConnectionError(
            f"Qdrant at {client.init_options['url']}: {told}. Is the server running there, and is QDRANT_API_KEY its "
            "key, if it has one?"
        ) from error


def _gallery_fingerprint(folder: EmbeddingFolder) -> str:
    """16 digits that tell embeddings and ids, and so the model, from all others."""
    digest = hashlib.sha256(json.dumps([folder.weights, folder.embeddings.shape, list(folder.columns)]).encode())
    digest.update(np.ascontiguousarray(folder.embeddings))
    for values in folder.columns.values():
        digest.update(json.dumps(values.tolist()).encode())
    return digest.hexdigest()[:16]


def open_index(
    folder: EmbeddingFolder, kind: str = "exact", qdrant_url: str | None = None
) -> ExactIndex | FaissIndex | QdrantIndex:
    """The index of a kind, over a folder's embeddings.

    Args:
        folder: As `read_embeddings` returns it.
        kind: "exact", "flat", "ivfpq", "hnsw" or "qdrant".
        qdrant_url: Of a server; without one Qdrant runs in this process, in memory. The environment variable
            QDRANT_API_KEY, if set, goes with it. The server's collection is named after a hash of embeddings and
            ids, so that each gallery has its own.

    Raises:
        ImportError: What the kind needs is not installed.
        ConnectionError: The server can't be reached, or refuses.
        ValueError: There is no such kind, or a URL was given for another one than "qdrant".
    """
    kinds = ["exact", *FAISS_KINDS, "qdrant"]
    if kind not in kinds:
        raise ValueError(f"The index must be one of {', '.join(kinds)}; got {kind!r}.")
    if qdrant_url and kind != "qdrant":
        raise ValueError(f'A Qdrant URL goes with the index "qdrant" alone, got {kind!r}.')
    if kind == "exact":
        return ExactIndex(folder.embeddings, folder.columns)
    if kind != "qdrant":
        return FaissIndex(folder, kind)
    require("qdrant_client", "qdrant")
    from qdrant_client import QdrantClient

    if not qdrant_url:
        return QdrantIndex(QdrantClient(":memory:"), "people", folder)
    key = os.environ.get("QDRANT_API_KEY")
    client = QdrantClient(url=qdrant_url, api_key=key, timeout=_QDRANT_TIMEOUT, check_compatibility=False)
    return QdrantIndex(client, f"personvit-{_gallery_fingerprint(folder)}", folder)


def load_gallery_images(data: str, split: str | None) -> datasets.Dataset:
    """The images of a gallery, with what ids they have: a split of a labelled data set, or unlabelled images.

    Raises:
        FileNotFoundError: As in `load_reid_dataset` and `load_person_images`.
        ValueError: As there, or if there is no such split.
    """
    if split is None:
        return load_person_images(data, keep=KEPT_ID_COLUMNS)
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
    rows = load_reid_dataset(data, require_train=split == "train")[split]
    return rows.cast_column("image", datasets.Image(decode=False))


def draw_results(queries: Sequence[Path], folder: EmbeddingFolder, indices: np.ndarray, file: Path) -> None:
    """Draws what `search` found, a row for each query, and writes the picture.

    Args:
        queries: Files of the queries.
        folder: The gallery; its images are read again from the data it was made of.
        indices: int64 (queries, k) as `search` returns them; a column that is not found for all is left out.
        file: Picture to write; its ending says of which kind.

    Raises:
        FileNotFoundError: The gallery's data are no longer there.
        ValueError: Nothing was found, an image is broken, or the data have changed.
    """
    rankings = indices[:, (indices >= 0).all(axis=0)]
    if not rankings.size:
        raise ValueError("Nothing to draw: no gallery image is left for some query.")
    images = load_gallery_images(folder.settings["data"], folder.settings["split"])
    folder.require_images(images)
    shown, places = np.unique(rankings, return_inverse=True)
    pictures = [decode_image(images[int(folder.rows[i])]["image"], folder.names[i]) for i in shown]
    # Whether they are right is not known here.
    figure = draw_rankings(
        [decode_image(query, str(query)) for query in queries], pictures, places.reshape(rankings.shape)
    )
    save_figure(figure, file)


def rank_benchmark(
    columns: Mapping[str, np.ndarray], queries: Sequence[int], k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What some queries of a labelled benchmark find, and whether it is right.

    Args:
        columns: What `embed_benchmark` returns.
        queries: Which ones, by index.
        k: How many gallery images for each; junk (person -1) is left out.

    Returns:
        (queries, k) or fewer columns: int64 gallery indices, most similar first; int64 outcomes, 1 for the same
        person, 0 for another, -1 for the same person in the same camera, which the protocol ignores; float32 cosine
        similarities.

    Raises:
        ValueError: As in `ExactIndex.search`.
    """
    people, cameras = columns["gallery_person_ids"], columns["gallery_camera_ids"]
    index = ExactIndex(columns["gallery_embeddings"], {"person_id": people})
    rankings, similarities = index.search(columns["query_embeddings"][queries], k, exclude={"person_id": [-1]})
    found = (rankings >= 0).all(axis=0)
    rankings, similarities = rankings[:, found], similarities[:, found]
    same_person = people[rankings] == columns["query_person_ids"][queries][:, None]
    same_camera = cameras[rankings] == columns["query_camera_ids"][queries][:, None]
    return rankings, np.where(same_person, np.where(same_camera, -1, 1), 0), similarities


def _checked_k(k: int, queries: np.ndarray, size: int, width: int) -> int:
    """How many to find for each query, once it is known that they fit the gallery of (size, width)."""
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"`queries` must be (queries, {width}), as wide as the gallery's, got {queries.shape}.")
    return min(k, size)


def _matching(
    columns: Mapping[str, np.ndarray], size: int, where: Filter | None, exclude: Filter | None
) -> np.ndarray | None:
    """Indices of the gallery images that the filters leave, or None for all of them."""
    if not where and not exclude:
        return None
    kept = np.ones(size, bool)
    for wanted, filters in ((True, where), (False, exclude)):
        for column, values in (filters or {}).items():
            values = _wanted(columns, column, values)
            kept &= np.isin(columns[column], values) == wanted
    return np.flatnonzero(kept)


def _wanted(columns: Mapping[str, np.ndarray], column: str, values: Sequence[Any]) -> list[Any]:
    """A filter's values, once it is known that the column can hold them: a string is equal to no number."""
    if column not in columns:
        raise ValueError(f"The gallery has no column `{column}` to filter by; it has {', '.join(columns) or 'none'}.")
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    held = _example(columns[column])
    for value in values:
        if held is not None and isinstance(value, str) != isinstance(held, str):
            raise ValueError(
                f"`{column}` of the gallery holds {type(held).__name__}, such as {held!r}: it can't be filtered by "
                f"{value!r}, which is {type(value).__name__}."
            )
    return values


def _example(ids: np.ndarray) -> Any:
    """An id that is there, which tells of which kind they are; None if there is none."""
    found = next((value for value in ids if value is not None), None)
    return found.item() if isinstance(found, np.generic) else found
