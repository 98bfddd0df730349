import base64
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from personvit_hf import app_page
from personvit_hf.app_page import RequestError, problem_html, read_picture, results_html, thumbnail

URL = "data:image/any;base64,"


def file_content(height=20, width=10, kind="PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).save(file, kind)
    return file.getvalue()


def as_url(content: bytes) -> str:
    return URL + base64.b64encode(content).decode()


def test_a_picture_comes_through_as_it_was_sent():
    picture = np.asarray(Image.open(io.BytesIO(file_content())))
    assert (read_picture(as_url(file_content())) == picture).all()
    assert read_picture(thumbnail(np.zeros((600, 300, 3), np.uint8))).shape == (256, 128, 3)


@pytest.mark.parametrize(
    "text",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/picture.png",
        "zip://a.png::/etc/archive.zip",
        "data:text/html;base64,AAAA",
        URL,
        URL + "....",
        as_url(b"GIF89a and so on"),
        as_url(file_content()[:60]),
        None,
        {"path": "/etc/passwd"},
        ["a"],
        7,
    ],
    ids=str,
)
def test_whatever_else_is_sent_is_refused_and_no_file_is_opened(text, monkeypatch):
    opened = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
    monkeypatch.setattr("personvit_hf.person_images.read_address", opened.append)
    with pytest.raises(RequestError):
        read_picture(text)
    assert not opened


@given(st.one_of(st.text(), st.binary().map(as_url), st.text().map(URL.__add__)))
def test_any_text_is_a_picture_or_a_request_error(text):
    try:
        assert read_picture(text).ndim == 3
    except RequestError as error:
        assert str(error)


def test_pictures_that_are_too_large():
    with pytest.raises(RequestError, match="8 MB"):
        read_picture(as_url(bytes(app_page.MAX_UPLOAD_BYTES + 10)))
    bomb = io.BytesIO()
    Image.new("L", (5000, 5000)).save(bomb, "PNG")  # 25 megapixels in some 30 kB
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(RequestError, match="5000 x 5000 pixels, more than the 16777216"):
        read_picture(as_url(bomb.getvalue()))


def test_names_and_problems_are_text_and_not_markup():
    for markup in (results_html([("data:,", 0.5, "<script>a</script>")]), problem_html("<script>a</script>")):
        assert "<script>" not in markup and "&lt;script&gt;" in markup
    assert "person 1<br>camera 2" in results_html([("data:,", 0.5, "person 1\ncamera 2")])


@pytest.mark.parametrize(
    "body, plain",
    [
        (b"", True),
        (json.dumps({"data": [as_url(file_content()), "model", 10]}).encode(), True),
        (json.dumps({"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}).encode(), False),
        (json.dumps({"data": [[{"deep": [{"url": "http://10.0.0.1/"}]}]]}).encode(), False),
        (b"--boundary\r\nContent-Disposition: form-data", False),
        (b"[" * 100_000, False),
        (b"\xff\xfe", False),
    ],
)
def test_requests_that_name_files_are_told_from_plain_ones(body, plain):
    assert app_page._is_plain(body) == plain


CLICK = """
const listeners = {}, props = {}, trigger = () => {};
const element = {addEventListener: (kind, listener) => listeners[kind] = listener};
SCRIPT
const button = {title: `<img src=x onerror="alert(1)"> & co`, querySelector: () => ({src: "data:image/jpeg;base64,"})};
listeners.click({target: {closest: () => button}});
console.log(props.name);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_name_of_a_gallery_picture_is_no_markup():
    code = CLICK.replace("SCRIPT", app_page.PICKER_SCRIPT)
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "&#60;img src=x onerror=&#34;alert(1)&#34;&#62; &#38; co"
