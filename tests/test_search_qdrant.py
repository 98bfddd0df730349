"""The adapter to a Qdrant server, over real HTTP: to a stand-in, and to the server that QDRANT_URL names, if any."""

import os
import re
from dataclasses import replace

import numpy as np
import pytest
from qdrant_server import qdrant_server
from test_search import FILTERS, gallery_folder, kept_by, plain_search, unit_rows

from personvit_hf import search
from personvit_hf.search import open_index

qdrant_client = pytest.importorskip("qdrant_client")
# the client warns of each try, and of a key without encryption
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]  # it takes seconds to import


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    monkeypatch.setattr(search, "_QDRANT_NUMBERS", 16 * 128)  # 128 images a request
    with qdrant_server() as running:
        yield running


@pytest.fixture(params=["stand-in", "QDRANT_URL"])
def server_url(request):
    """Of a server to fill and search; of a real one the collections made here are deleted."""
    if request.param == "stand-in":
        with qdrant_server(os.environ.get("QDRANT_API_KEY")) as running:
            yield running.url
        return
    url = os.environ.get("QDRANT_URL")
    if not url:
        pytest.skip("QDRANT_URL names no Qdrant server")
    client = qdrant_client.QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"))
    before = {collection.name for collection in client.get_collections().collections}
    yield url
    for collection in client.get_collections().collections:
        if collection.name not in before and collection.name.startswith("personvit-"):
            client.delete_collection(collection.name)


def test_a_server_finds_what_sorting_finds(server_url, tmp_path):
    folder = gallery_folder(tmp_path, size=2000)
    queries = unit_rows(np.random.default_rng(1), 5)
    for index in (open_index(folder, "qdrant", server_url), open_index(folder, "qdrant", server_url)):
        for where, exclude in FILTERS:
            indices, similarities = index.search(queries, 7, where, exclude)
            expected = plain_search(folder, queries, 7, kept_by(folder, where, exclude))
            np.testing.assert_array_equal(indices, expected)
            found = np.einsum("qkd,qd->qk", folder.embeddings[expected], queries)
            np.testing.assert_allclose(similarities, found, rtol=0, atol=1e-5)
    indices, similarities = index.search(queries, 3, {"camera_id": np.array([99])})
    assert (indices == -1).all() and np.isnan(similarities).all()


def test_what_is_sent(server, tmp_path):
    folder = gallery_folder(tmp_path)
    queries = unit_rows(np.random.default_rng(1), 200)
    index = open_index(folder, "qdrant", server.url)
    index.search(queries, 3, {"camera_id": [1]}, {"track_id": [4, 5]})
    (name,) = server.collections
    assert re.fullmatch("personvit-[0-9a-f]{16}", name)
    assert server.bodies(f"^PUT /collections/{name}$") == [{"vectors": {"size": 16, "distance": "Cosine"}}]
    assert server.collections[name].indexed == {"camera_id": "integer", "track_id": "integer", "gallery": "keyword"}
    upserts = server.bodies(r"^PUT .*/points\?wait=true$")  # the next one goes when the last one is done
    assert [len(body["points"]) for body in upserts] == [128, 128, 44]
    point = upserts[1]["points"][3]
    assert point["id"] == 131
    np.testing.assert_array_equal(np.float32(point["vector"]), folder.embeddings[131])
    ids = {column: int(values[131]) for column, values in folder.columns.items()}
    assert point["payload"] == {"gallery": name.removeprefix("personvit-"), **ids}
    searches = [body["searches"] for body in server.bodies("/points/query/batch")]
    assert [len(batch) for batch in searches] == [128, 72]
    np.testing.assert_array_equal(np.float32(searches[1][0].pop("query")["nearest"]), queries[128])
    assert searches[1][0] == {
        "limit": 3,
        "filter": {
            "must": [{"key": "camera_id", "match": {"any": [1]}}],
            "must_not": [{"key": "track_id", "match": {"any": [4, 5]}}],
        },
        "params": {"hnsw_ef": 256},
    }


def test_a_filled_collection_is_not_filled_again_and_each_gallery_has_its_own(server, tmp_path):
    folder = gallery_folder(tmp_path)
    open_index(folder, "qdrant", server.url)
    sent = len(server.bodies("^PUT"))
    open_index(folder, "qdrant", server.url)
    assert len(server.bodies("^PUT")) == sent
    others = [
        gallery_folder(tmp_path, weights="sha256:2"),
        replace(folder, embeddings=folder.embeddings[::-1]),
        replace(folder, columns={**folder.columns, "camera_id": folder.columns["camera_id"] + 1}),
        replace(folder, columns={}),
    ]
    for count, other in enumerate(others, start=2):
        open_index(other, "qdrant", server.url)
        assert len(server.collections) == count


def test_ids_may_be_strings(server, tmp_path):
    folder = gallery_folder(tmp_path, size=4)
    folder = replace(folder, columns={"person_id": np.array(["a", "b", "a", "c"], object)})
    index = open_index(folder, "qdrant", server.url)
    assert sorted(index.search(folder.embeddings[:1], 9, {"person_id": ["a"]})[0][0].tolist())[-2:] == [0, 2]


def test_images_may_have_no_id(server, tmp_path):
    folder = gallery_folder(tmp_path, size=3)
    folder = replace(folder, columns={"track_id": np.array([None, 5, 7], object), "camera_id": np.array([None] * 3)})
    index = open_index(folder, "qdrant", server.url)
    (collection,) = server.collections.values()
    assert collection.indexed == {"track_id": "integer", "camera_id": "keyword", "gallery": "keyword"}
    payloads = [collection.payloads[i] for i in range(3)]
    assert [payload.get("track_id") for payload in payloads] == [None, 5, 7]
    assert "track_id" not in payloads[0] and not any("camera_id" in payload for payload in payloads)
    found = index.search(folder.embeddings[:1], 3, {}, {"track_id": [5]})[0][0].tolist()
    assert set(found) == {0, 2, -1}


@pytest.mark.parametrize("action", [500, 429, "cut"])
def test_a_request_that_fails_is_sent_again(action, server, tmp_path):
    server.faults = [("PUT .*/points$", action), ("PUT .*/points$", action)]
    folder = gallery_folder(tmp_path)
    index = open_index(folder, "qdrant", server.url)
    assert not server.faults
    assert (index.search(folder.embeddings, 1)[0][:, 0] == np.arange(300)).all()


def test_a_filling_that_was_cut_off_goes_on(server, tmp_path):
    folder = gallery_folder(tmp_path)
    # the second request is carried out, but not answered, and its three repetitions fail
    server.faults = [("PUT .*/points$", action) for action in (None, "cut", 500, 500, 500)]
    with pytest.raises(ConnectionError, match="500"):
        open_index(folder, "qdrant", server.url)
    (collection,) = server.collections.values()
    assert len(collection.payloads) == 256 and not server.faults
    del collection.payloads[255], collection.vectors[255]  # a request may have reached a part of a cluster only
    sent = len(server.bodies("PUT .*/points"))
    index = open_index(folder, "qdrant", server.url)
    assert [body["points"][0]["id"] for body in server.bodies("PUT .*/points")[sent:]] == [128, 256]
    assert (index.search(folder.embeddings, 1)[0][:, 0] == np.arange(300)).all()


def test_keys(server, tmp_path, monkeypatch):
    folder = gallery_folder(tmp_path)
    server.key = "secret"
    with pytest.raises(ConnectionError, match=rf"Qdrant at {server.url}: .*401.*QDRANT_API_KEY") as error:
        open_index(folder, "qdrant", server.url)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    index = open_index(folder, "qdrant", server.url)
    assert {headers.get("api-key") for *_, headers in server.requests[1:]} == {"secret"}
    server.key = "another"
    with pytest.raises(ConnectionError, match="401") as error:
        index.search(folder.embeddings[:1], 1)
    assert "secret" not in str(error.value)


def test_servers_that_do_not_answer(server, tmp_path, monkeypatch):
    folder = gallery_folder(tmp_path)
    index = open_index(folder, "qdrant", server.url)
    monkeypatch.setattr(search, "_QDRANT_TIMEOUT", 1)
    hasty = open_index(folder, "qdrant", server.url)
    for searched, action, message in (
        (index, 500, "500.*told to fail"),
        (index, "cut", "disconnected"),
        (hasty, 3.0, "time"),
    ):
        server.faults = [("query/batch", action)]
        with pytest.raises(ConnectionError, match=f"Qdrant at {server.url}: .*{message}"):
            searched.search(folder.embeddings[:1], 1)
    server.collections.clear()
    with pytest.raises(ConnectionError, match="404.*Not found"):
        index.search(folder.embeddings[:1], 1)
    with pytest.raises(ConnectionError, match="Qdrant at http://127.0.0.1:9: .*refused"):
        open_index(folder, "qdrant", "http://127.0.0.1:9")
