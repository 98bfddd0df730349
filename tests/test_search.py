import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from personvit_hf.embedding import EmbeddingFolder
from personvit_hf.search import (
    ExactIndex,
    FaissIndex,
    QdrantIndex,
    draw_results,
    load_gallery_images,
    open_index,
    rank_benchmark,
)


def unit_rows(rng, count, dim=16):
    rows = rng.normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def gallery_folder(path, seed=0, size=300, weights="sha256:1") -> EmbeddingFolder:
    path.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    columns = {"camera_id": rng.integers(0, 4, size), "track_id": rng.integers(0, 30, size)}
    settings = {"weights": weights, "model": "m", "data": "d", "split": None, "num_images": size}
    names = [f"row {i}" for i in range(size)]
    return EmbeddingFolder(path, settings, unit_rows(rng, size), np.arange(size), names, columns)


def plain_search(folder, queries, k, kept):
    similarities = queries.astype(np.float64) @ folder.embeddings.T
    similarities[:, ~kept] = -np.inf
    return np.argsort(-similarities, axis=1, kind="stable")[:, :k]


QDRANT = pytest.param("qdrant", marks=pytest.mark.slow)  # its client takes seconds to import
FILTERS = [({}, {}), ({"camera_id": [1, 3]}, {}), ({}, {"camera_id": [0]}), ({"camera_id": [2]}, {"track_id": [4, 5]})]


def kept_by(folder, where, exclude):
    kept = np.ones(len(folder.embeddings), bool)
    for column, values in where.items():
        kept &= np.isin(folder.columns[column], values)
    for column, values in exclude.items():
        kept &= ~np.isin(folder.columns[column], values)
    return kept


def make_index(kind, folder):
    if kind == "exact":
        return ExactIndex(folder.embeddings, folder.columns)
    if kind == "qdrant":
        qdrant_client = pytest.importorskip("qdrant_client")
        return QdrantIndex(qdrant_client.QdrantClient(":memory:"), "people", folder)
    pytest.importorskip("faiss")
    return FaissIndex(folder, kind)


@pytest.mark.parametrize("kind", ["exact", "flat", "hnsw", QDRANT])
@pytest.mark.parametrize(("where", "exclude"), FILTERS)
def test_indices_agree(kind, where, exclude, tmp_path):
    folder = gallery_folder(tmp_path)
    queries = unit_rows(np.random.default_rng(1), 5)
    indices, similarities = make_index(kind, folder).search(queries, 7, where, exclude)
    expected = plain_search(folder, queries, 7, kept_by(folder, where, exclude))
    np.testing.assert_array_equal(indices, expected)
    found = np.einsum("qkd,qd->qk", folder.embeddings[expected], queries)
    np.testing.assert_allclose(similarities, found, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compressed_index_finds_most(tmp_path):
    folder = gallery_folder(tmp_path, size=4000)
    queries = folder.embeddings[:50]
    indices, similarities = make_index("ivfpq", folder).search(queries, 10)
    expected = plain_search(folder, queries, 10, np.ones(4000, bool))
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices, expected, strict=True)]) > 0.8
    found = np.einsum("qkd,qd->qk", folder.embeddings[indices], queries)
    np.testing.assert_allclose(similarities, found, rtol=0, atol=1e-6)  # not those of the compressed vectors


def test_a_compressed_index_finds_most_in_a_narrow_cone(tmp_path):
    """As fine-tuned models make features: cosines of any two are all but 1."""
    rng = np.random.default_rng(0)
    rows = unit_rows(rng, 1, 64) + 0.04 * unit_rows(rng, 1050, 64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    queries, rows = rows[:50], rows[50:]
    assert (queries @ rows.T).mean() > 0.998
    folder = replace(gallery_folder(tmp_path, size=1000), embeddings=rows)
    indices, _ = make_index("ivfpq", folder).search(queries, 10)
    expected = plain_search(folder, queries, 10, np.ones(1000, bool))
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(indices, expected, strict=True)]) > 0.8


def test_a_compressed_index_of_inner_products_is_refused(tmp_path):
    folder = gallery_folder(tmp_path)
    make_index("ivfpq", folder)
    stamp = tmp_path / "index-ivfpq.json"
    told = json.loads(stamp.read_text())
    del told["metric"]  # as it was before
    stamp.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"index-ivfpq\.faiss.*of another kind.*Remove it to build it anew"):
        make_index("ivfpq", folder)


def test_a_compressed_index_of_few(tmp_path):
    index = make_index("ivfpq", gallery_folder(tmp_path / "16", size=16))
    assert (np.sort(index.search(index.to_compare[:2], 20)[0][:, :16]) == np.arange(16)).all()
    with pytest.raises(ValueError, match="16 images.*has 15.*exact"):
        make_index("ivfpq", gallery_folder(tmp_path, size=15))


@pytest.mark.parametrize("kind", ["exact", "flat", QDRANT])
def test_fewer_images_than_asked_for(kind, tmp_path):
    folder = gallery_folder(tmp_path)
    rare = int(np.bincount(folder.columns["track_id"]).argmin())
    count = int((folder.columns["track_id"] == rare).sum())
    index = make_index(kind, folder)
    assert [part.shape for part in index.search(folder.embeddings[:2], 10**12)] == [(2, 300)] * 2
    indices, similarities = index.search(folder.embeddings[:2], count + 3, {"track_id": [rare]})
    assert (indices >= 0).sum(axis=1).tolist() == [count, count]
    assert (indices[:, count:] == -1).all() and np.isnan(similarities[:, count:]).all()
    indices, _ = index.search(folder.embeddings[:2], 2, {"track_id": [99]})
    assert (indices == -1).all()


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 60), k=st.integers(1, 70))
def test_exact_search_is_sorting(seed, size, k):
    rng = np.random.default_rng(seed)
    gallery = unit_rows(rng, size, 3)[rng.integers(0, size, size)]  # with duplicates: ties go by index
    indices, _ = ExactIndex(gallery, {}).search(unit_rows(rng, 4, 3), k)
    assert indices.shape == (4, min(k, size)) and (indices >= 0).all()
    for row in indices:
        assert len(set(row.tolist())) == min(k, size)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 40), k=st.integers(1, 50))
def test_equal_ones_are_found_by_index(seed, size, k):
    rng = np.random.default_rng(seed)
    gallery = np.eye(3, dtype=np.float32)[rng.integers(0, 3, size)]  # products without rounding
    queries = np.eye(3, dtype=np.float32)
    indices, similarities = ExactIndex(gallery, {}).search(queries, k)
    np.testing.assert_array_equal(indices, np.argsort(-queries @ gallery.T, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(similarities, -np.sort(-queries @ gallery.T, axis=1)[:, :k])


@pytest.mark.parametrize("batch", [1, 5])
def test_equal_ones_are_found_by_index_wherever_they_stand(batch):
    """Matrix products sum the columns at their edge in another order: the last bit of equal rows differs."""
    rng = np.random.default_rng(0)
    for size in range(30, 90):
        gallery = unit_rows(rng, size, 384)
        gallery[-1] = gallery[0]
        queries = gallery[:1] + 0.01 * unit_rows(rng, batch, 384)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        indices, similarities = ExactIndex(gallery, {}).search(queries, 3)
        assert (indices[:, :2] == [0, size - 1]).all()
        assert (ExactIndex(gallery, {}).search(queries, 1)[0] == 0).all()
        exact = np.einsum("qd,qkd->qk", queries.astype(np.float64), gallery[indices].astype(np.float64))
        np.testing.assert_array_equal(similarities, exact.astype(np.float32))


def test_a_gallery_of_one_picture_is_found_by_index():
    gallery = np.repeat(unit_rows(np.random.default_rng(0), 1, 384), 5000, axis=0)
    indices, _ = ExactIndex(gallery, {}).search(gallery[:2], 7)
    assert (indices == np.arange(7)).all()


@pytest.mark.parametrize("kept_share", [0.1, 0.9])
def test_a_wide_filter_copies_no_gallery(kept_share):
    rng = np.random.default_rng(0)
    gallery = unit_rows(rng, 20_000, 64)
    camera = (rng.random(20_000) < kept_share).astype(int)
    index = ExactIndex(gallery, {"camera_id": camera})
    tracemalloc.start()
    try:
        indices, _ = index.search(gallery[:2], 5, {"camera_id": [1]})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < gallery.nbytes / 4
    kept = np.flatnonzero(camera)
    np.testing.assert_array_equal(indices, kept[ExactIndex(gallery[kept], {}).search(gallery[:2], 5)[0]])


def test_queries_that_are_no_numbers_find_what_may_be_found():
    gallery = unit_rows(np.random.default_rng(0), 30)
    index = ExactIndex(gallery, {"camera_id": np.arange(30) % 2})
    indices, similarities = index.search(
        np.stack([gallery[3], np.full(16, np.nan, np.float32)]), 4, {"camera_id": [1]}
    )
    assert indices[0, 0] == 3 and (indices % 2 == 1).all()
    assert np.isfinite(similarities[0]).all() and np.isnan(similarities[1]).all()


def test_an_index_is_kept_and_one_of_another_model_is_refused(tmp_path):
    pytest.importorskip("faiss")
    folder = gallery_folder(tmp_path)
    queries = folder.embeddings[:3]
    built = FaissIndex(folder, "flat").search(queries, 5)
    time = (tmp_path / "index-flat.faiss").stat().st_mtime_ns
    again = FaissIndex(folder, "flat").search(queries, 5)
    assert (tmp_path / "index-flat.faiss").stat().st_mtime_ns == time
    np.testing.assert_array_equal(built, again)
    with pytest.raises(ValueError, match="index of other embeddings"):
        FaissIndex(gallery_folder(tmp_path, weights="sha256:2"), "flat")
    stamp = tmp_path / "index-flat.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"factory": "IVF8,PQ4"}))
    with pytest.raises(ValueError, match="or of another kind"):
        FaissIndex(folder, "flat")
    stamp.write_text("{")
    with pytest.raises(ValueError, match=r"index-flat\.faiss.*Remove it"):
        FaissIndex(folder, "flat")
    stamp.unlink()
    with pytest.raises(ValueError, match="index of other embeddings"):
        FaissIndex(folder, "flat")


def test_an_index_is_written_nowhere_else(tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match=r'o::x/index-flat\.faiss: there can be no index.*"exact"'):
        FaissIndex(gallery_folder(tmp_path / "o::x"), "flat")
    assert [path.name for path in tmp_path.rglob("*")] == ["o::x"]


def test_an_index_of_as_many_other_images_is_refused(tmp_path):
    pytest.importorskip("faiss")
    FaissIndex(gallery_folder(tmp_path), "flat")
    replaced = gallery_folder(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"index-flat\.faiss is an index of other embeddings.*Remove it"):
        FaissIndex(replaced, "flat")
    (tmp_path / "index-flat.faiss").unlink()
    assert FaissIndex(replaced, "flat").search(replaced.embeddings[:2], 1)[0].tolist() == [[0], [1]]


@pytest.mark.slow
def test_a_collection_of_another_model_is_refused(tmp_path):
    client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
    QdrantIndex(client, "people", gallery_folder(tmp_path))
    QdrantIndex(client, "people", gallery_folder(tmp_path))
    for other in (gallery_folder(tmp_path, weights="sha256:2"), gallery_folder(tmp_path, size=200)):
        with pytest.raises(ValueError, match="people.*another model"):
            QdrantIndex(client, "people", other)


@pytest.mark.parametrize("kind", ["exact", "flat", QDRANT])
def test_images_without_ids_are_filtered_too(kind, tmp_path):
    folder = gallery_folder(tmp_path, size=6)
    folder = replace(folder, columns={"track_id": np.array([None, 5, 4, 5, None, 4], object)})
    index = make_index(kind, folder)

    def found(where, exclude):
        return {row for row in index.search(folder.embeddings[:1], 6, where, exclude)[0][0].tolist() if row >= 0}

    assert found({"track_id": [5]}, {}) == {1, 3}
    assert found({}, {"track_id": [5]}) == {0, 2, 4, 5}
    assert found({"track_id": np.array([4, 5])}, {}) == {1, 2, 3, 5}


@pytest.mark.parametrize("kind", ["exact", "flat", QDRANT])
def test_values_of_another_kind_than_the_ids_are_refused(kind, tmp_path):
    folder = gallery_folder(tmp_path, size=4)
    columns = {"camera_id": np.array([None, "0", "1", "1"], object), "track_id": np.arange(4)}
    index = make_index(kind, replace(folder, columns=columns))
    told = "`camera_id` of the gallery holds str, such as '0'.*filtered by 1, which is int"
    for where, exclude in (({"camera_id": [1]}, {}), ({}, {"camera_id": np.array([1])})):
        with pytest.raises(ValueError, match=told):
            index.search(folder.embeddings[:1], 4, where, exclude)
    with pytest.raises(ValueError, match="`track_id` .* holds int, such as 0.*'1', which is str"):
        index.search(folder.embeddings[:1], 4, {"track_id": ["1"]})
    assert set(index.search(folder.embeddings[:1], 4, {}, {"camera_id": ["1"]})[0][0].tolist()) == {0, 1, -1}


@pytest.mark.parametrize("kind", ["exact", "flat", QDRANT])
def test_bad_searches(kind, tmp_path):
    index = make_index(kind, gallery_folder(tmp_path))
    queries = unit_rows(np.random.default_rng(0), 2)
    with pytest.raises(ValueError, match="no column `person_id`.*camera_id, track_id"):
        index.search(queries, 3, {"person_id": [1]})
    with pytest.raises(ValueError, match="at least 1"):
        index.search(queries, 0)
    with pytest.raises(ValueError, match=r"\(queries, 16\)"):
        index.search(queries[:, :8], 3)


def test_unknown_kinds_and_splits(tmp_path):
    with pytest.raises(ValueError, match="flat, ivfpq, hnsw"):
        FaissIndex(gallery_folder(tmp_path), "lsh")
    with pytest.raises(ValueError, match="exact, flat, ivfpq, hnsw, qdrant; got 'lsh'"):
        open_index(gallery_folder(tmp_path), "lsh")
    with pytest.raises(ValueError, match="Qdrant URL.*'exact'"):
        open_index(gallery_folder(tmp_path), "exact", "http://localhost:6333")
    with pytest.raises(ValueError, match="train, query, gallery"):
        load_gallery_images(str(tmp_path), "test")


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"faiss is not installed: pip install 'personvit-hf\[search\]'"):
        FaissIndex(gallery_folder(tmp_path), "flat")


def test_drawing(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    files = [tmp_path / "images" / f"{i}.png" for i in range(4)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (30, 15, 3), dtype=np.uint8)).save(file)
    settings = {"weights": "w", "data": str(tmp_path / "images"), "split": None, "num_images": 4}
    folder = EmbeddingFolder(
        tmp_path, settings, unit_rows(rng, 3), np.array([0, 2, 3]), [str(files[i]) for i in (0, 2, 3)], {}
    )
    indices = np.array([[2, 0, -1], [1, 2, 0]])
    draw_results(files[:2], folder, indices, tmp_path / "drawn" / "out.png")
    assert Image.open(tmp_path / "drawn" / "out.png").format == "PNG"
    with pytest.raises(ValueError, match="Nothing to draw"):
        draw_results(files[:1], folder, np.array([[-1, -1]]), tmp_path / "out.png")
    Path(files[3]).rename(tmp_path / "images" / "1a.png")
    with pytest.raises(ValueError, match=r"changed: row 2 was .*2\.png, now .*1a\.png"):
        draw_results(files[:2], folder, indices, tmp_path / "out.png")
    Path(tmp_path / "images" / "1a.png").unlink()
    with pytest.raises(ValueError, match="3 images now, 4"):
        draw_results(files[:2], folder, indices, tmp_path / "out.png")


def test_a_sheet_of_a_benchmark_leaves_out_junk_and_tells_what_is_ignored():
    columns = {
        "query_embeddings": np.eye(2, 3, dtype=np.float32),
        "query_person_ids": np.array([7, 8]),
        "query_camera_ids": np.array([0, 1]),
        "gallery_embeddings": np.array([[0.6, 0.8, 0], [1, 0, 0], [0.8, 0.6, 0], [0, 1, 0]], np.float32),
        "gallery_person_ids": np.array([7, -1, 7, 0]),
        "gallery_camera_ids": np.array([1, 1, 0, 1]),
    }
    rankings, outcomes, similarities = rank_benchmark(columns, [0, 1], 10)
    assert rankings.tolist() == [[2, 0, 3], [3, 0, 2]]
    assert outcomes.tolist() == [[-1, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(similarities, [[0.8, 0.6, 0], [1, 0.8, 0.6]], atol=1e-6)
