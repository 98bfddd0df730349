"""The app over its HTTP interface, as a page, a script or somebody hostile uses it."""

import base64
import http.client
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from app_server import DATA, small_checkpoint
from PIL import Image
from pyarrow import Table, parquet

from personvit_hf.embedding import write_embeddings
from personvit_hf.person_images import load_person_images

pytest.importorskip("gradio")
from personvit_hf import app  # noqa: E402
from personvit_hf.app import PersonFinder, launch_app, named_sources  # noqa: E402
from personvit_hf.app_page import RequestError  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A gallery of plain colours."""
    folder = tmp_path_factory.mktemp("gallery")
    for i in range(12):
        Image.new("RGB", (30, 60), (20 * i, 255 - 20 * i, 90)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def finder(pictures, tmp_path_factory) -> PersonFinder:
    models = {name: small_checkpoint(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("one", "two"))}
    made = PersonFinder(models, {"colours": str(pictures)})
    embedded = tmp_path_factory.mktemp("embedded")
    source = {"model": models["one"], "data": str(pictures), "split": None}
    write_embeddings(*made.models["one"].loaded, load_person_images(pictures), embedded, source)
    made.galleries["embedded"] = str(embedded)
    return made


@pytest.fixture(scope="module")
def server(finder, tmp_path_factory):
    """(host, port, folder of Gradio's files) of the running app."""
    files = tmp_path_factory.mktemp("gradio")
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = str(files)
    blocks = launch_app(finder, block=False)
    host, port = re.fullmatch(r"http://([\d.]+):(\d+)/", blocks.local_url).groups()
    yield host, int(port), files
    blocks.close()
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


def sent(content: bytes) -> str:
    return "data:image/any;base64," + base64.b64encode(content).decode()


def colour(i: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (30, 60), (20 * i, 255 - 20 * i, 90)).save(file, "PNG")
    return sent(file.getvalue())


def request(server, method, path, body=None, headers=None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*server[:2], timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def call(server, name, *data) -> list:
    status, text = request(server, "POST", f"/gradio_api/call/{name}", json.dumps({"data": data}))
    assert status == 200, text
    _, events = request(server, "GET", f"/gradio_api/call/{name}/{json.loads(text)['event_id']}")
    kind, data = re.findall(r"^event: (\w+)\ndata: (.*)$", events, flags=re.MULTILINE)[-1]
    return [kind, json.loads(data)]


def test_it_listens_on_this_machine_alone(server):
    assert server[0] == "127.0.0.1"
    status, page = request(server, "GET", "/")
    assert status == 200 and "PersonViT" in page


@pytest.mark.parametrize("gallery", ["colours", "embedded"])
def test_a_search_ranks_the_gallery_and_explains(server, gallery):
    kind, (results, explanations) = call(server, "search", colour(4), "one", gallery, 5)
    assert kind == "complete"
    assert results.count("<figure>") == 5 and explanations.count("<img") == 3
    similarities = [float(value) for value in re.findall(r"· (-?[\d.]+)<br>", results)]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] == 1.0
    first = re.search(r'src="data:image/jpeg;base64,([^"]+)"', results)[1]
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(first)))).mean(axis=(0, 1))
    np.testing.assert_allclose(found, (80, 175, 90), atol=4)


def test_two_pictures_are_compared(server):
    kind, (same,) = call(server, "compare", colour(3), colour(3), "one")
    assert kind == "complete" and "similarity 1.00000" in same and same.count("<img") == 3
    _, (other,) = call(server, "compare", colour(0), colour(11), "one")
    assert float(re.search(r"similarity (-?[\d.]+)", other)[1]) < 1
    # one of the gallery's twelve is the first itself, and few are further from it than the last
    share = lambda page: int(re.search(r"first picture than (\d+)% of the gallery colours", page)[1])  # noqa: E731
    assert share(same) in (92, 100) and share(other) <= 17


def test_a_gallery_of_another_model_places_no_pair(finder):
    embedded = PersonFinder({"two": finder.models["two"].path}, {"embedded": finder.galleries["embedded"]})
    page = embedded.compare(colour(0), colour(11), "two")
    assert "similarity" in page and "of the gallery" not in page


def test_a_script_may_use_gradios_client(server):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client("http://{}:{}".format(*server[:2]), verbose=False)
    results, explanations = client.predict(colour(1), "two", "colours", 3, api_name="/search")
    assert results.count("<figure>") == 3 and "<img" in explanations
    client.close()


@pytest.mark.parametrize(
    "data, problem",
    [
        (["/etc/passwd", "one", "colours", 5], "This is no picture"),
        (["data:image/png;base64,AAAA", "one", "colours", 5], "not an image"),
        ([sent(b"<svg onload=alert(1)>"), "one", "colours", 5], "not an image"),
        ([colour(1), "one", "colours", 51], "from 1 to 50|Error|maximum"),
        ([colour(1), "one", "colours", "many"], ""),
        ([colour(1), "../two", "colours", 5], ""),
        ([colour(1), "one", "/etc", 5], ""),
        ([colour(1), "two", "embedded", 5], "another model"),
    ],
)
def test_wrong_requests_find_nothing_and_tell_no_paths(server, finder, data, problem):
    kind, answer = call(server, "search", *data)
    text = json.dumps(answer)
    assert "<figure" not in text
    if kind == "complete":
        assert re.search(problem, answer[0])
    for path in (*finder.galleries.values(), *(model.path for model in finder.models.values()), "site-packages"):
        assert path not in text


FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "value",
    [FILE, FILE | {"path": "http://127.0.0.1:1/a.png"}, [FILE], {"url": "http://127.0.0.1:1/"}, {"a": [FILE]}],
    ids=str,
)
@pytest.mark.parametrize("path", ["call/search", "run/search", "queue/join", "api/search", "call/v2/search"])
def test_requests_that_name_files_or_addresses_are_refused(server, path, value):
    body = json.dumps({"data": [value, "one", "colours", 5], "fn_index": 0, "session_hash": "a"})
    assert request(server, "POST", f"/gradio_api/{path}", body)[0] == 400


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=../../../../etc/passwd"),
        ("GET", "/gradio_api/file%3D/etc/passwd"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit/"),
        ("GET", "/gradio_api/deep_link?session_hash=abc"),
        ("GET", "/gradio_api/stream/a/b/c/playlist-file"),
    ],
)
def test_doors_to_files_are_shut(server, method, path):
    status, text = request(server, method, path, "{}" if method == "POST" else None)
    assert status in (403, 404) and "root:" not in text


@pytest.mark.parametrize(
    "path", ["/static/../../etc/passwd", "/assets/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/svelte/..%2f"]
)
def test_paths_lead_nowhere(server, path):
    status, text = request(server, "GET", path)
    assert status >= 400 or "root:" not in text


def test_uploads_as_forms_are_refused(server):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nabc\r\n--x--\r\n'
    assert request(server, "POST", "/gradio_api/upload", body, form)[0] == 403
    assert request(server, "POST", "/gradio_api/queue/join", body, form)[0] == 400


def test_a_request_of_any_length_is_cut_off(server):
    def pieces():
        for _ in range(40):
            yield b" " * 2**20

    connection = http.client.HTTPConnection(*server[:2], timeout=60)
    try:
        connection.request("POST", "/gradio_api/call/search", pieces(), encode_chunked=True)
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server hung up while we were still sending
    finally:
        connection.close()
    assert call(server, "search", colour(1), "one", "colours", 1)[0] == "complete"


def test_nothing_that_was_sent_lies_on_the_disk(server):
    call(server, "search", colour(2), "one", "colours", 3)
    call(server, "compare", colour(2), colour(3), "one")
    assert not [path for path in server[2].rglob("*") if path.is_file()]


def test_pictures_to_try_come_from_a_labelled_gallery(finder):
    assert finder.examples() == []
    shown = PersonFinder({"m": finder.models["one"].path}, {"demo": DATA}).examples()
    assert len(shown) == 6 and all(picture.dtype == np.uint8 for picture, _ in shown)
    assert all(re.fullmatch(r"person \d+, camera \d+", name) for _, name in shown)


def test_models_compute_where_accelerate_does(finder, monkeypatch):
    monkeypatch.setattr(app, "PartialState", lambda: SimpleNamespace(device=torch.device("meta")))
    made = PersonFinder({"one": finder.models["one"].path}, finder.galleries)
    assert made.models["one"].loaded[0].device.type == "meta"


def test_the_ranking_comes_before_the_drawings(finder):
    first, last = finder.search(colour(4), "one", "colours", 5)
    assert first[0] == last[0] and first[0].count("<figure>") == 5
    assert "<img" not in first[1] and last[1].count("<img") == 3


def test_names_of_sources():
    assert named_sources(["runs/a", "owner/b", "c=runs/d"]) == {"a": "runs/a", "b": "owner/b", "c": "runs/d"}
    with pytest.raises(ValueError, match="Two sources are called a"):
        named_sources(["runs/a", "old/a"])


def test_an_existing_path_may_have_an_equals_sign(tmp_path):
    (tmp_path / "lr=0.1" / "finetuned").mkdir(parents=True)
    text = str(tmp_path / "lr=0.1" / "finetuned")
    assert named_sources([text]) == {"finetuned": text}
    assert named_sources([f"best={text}"]) == {"best": text}


def test_sources_that_are_not_there_are_told_at_the_start(finder, tmp_path):
    model = {"m": finder.models["one"].path}
    with pytest.raises(ValueError, match="at least one model"):
        PersonFinder({}, {"g": DATA})
    with pytest.raises((FileNotFoundError, OSError), match="nowhere"):
        PersonFinder({"m": str(tmp_path / "nowhere")}, {"g": DATA})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PersonFinder(model, {"g": str(tmp_path / "nowhere")})


def test_captions_tell_the_ids_that_there_are(finder, pictures, tmp_path):
    images = [{"bytes": (pictures / f"{i:02}.png").read_bytes(), "path": None} for i in range(3)]
    table = Table.from_pydict({"image": images, "camera_id": [0, 0, 1], "track_id": [7.0, float("nan"), None]})
    parquet.write_table(table, tmp_path / "gallery.parquet")
    tracked = PersonFinder({"one": finder.models["one"].path}, {"tracked": str(tmp_path / "gallery.parquet")})
    assert tracked._gallery("one", "tracked").names == ["camera 0\ntrack 7", "camera 0", "camera 1"]


@pytest.mark.parametrize("kind", ["embedded", "unfinished", "pictures"])
def test_a_gallery_that_is_no_longer_there_is_told_without_its_path(finder, tmp_path, caplog, kind):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (30, 60), "red").save(tmp_path / "data" / "a.png")
    model, gallery = finder.models["one"], tmp_path / ("data" if kind == "pictures" else "gallery")
    if kind != "pictures":
        source = {"model": model.path, "data": str(tmp_path / "data"), "split": None}
        write_embeddings(*model.loaded, load_person_images(tmp_path / "data"), gallery, source)
    searching = PersonFinder({"one": model.path}, {"g": str(gallery)})
    if kind == "unfinished":
        (gallery / "shard-00000.safetensors").unlink()
    else:
        (tmp_path / "data").rename(tmp_path / "moved")
    ((results, _),) = searching.search(colour(1), "one", "g", 5)
    assert "This gallery can" in results and str(tmp_path) not in results
    assert str(tmp_path) in caplog.text
    assert "of the gallery" not in searching.compare(colour(0), colour(11), "one")


def test_a_gallery_that_is_not_finished_is_told_at_the_start(finder, pictures, tmp_path):
    model = finder.models["one"]
    source = {"model": model.path, "data": str(pictures), "split": None}
    write_embeddings(
        *model.loaded, load_person_images(pictures), tmp_path, source, 6, process_index=1, num_processes=2
    )
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is missing"):
        PersonFinder({"one": model.path}, {"g": str(tmp_path)})


def test_a_gallery_of_broken_pictures_is_told(finder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    broken = PersonFinder({"one": finder.models["one"].path}, {"broken": str(tmp_path)})
    with pytest.raises(RequestError, match="No picture of this gallery can be read"):
        broken._gallery("one", "broken")
