"""The app's page: markup, style and the script that reads a picture in the browser; and what may reach the server.

Pictures travel as text (data URLs) and results as text with the pictures in it, so that Gradio's files, on disk and
reachable by address, have no part in it.
"""

from __future__ import annotations

import base64
import binascii
import html
import io
import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from .person_images import decode_image

MAX_UPLOAD_BYTES = 8 * 2**20
MAX_UPLOAD_PIXELS = 2**24
# two pictures as base64, and names
MAX_REQUEST_BYTES = 2 * (4 * MAX_UPLOAD_BYTES // 3) + 2**16

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,20};base64,")
# Gradio's doors to files and other servers. The app needs none of them.
_CLOSED = re.compile(
    r"(^|/gradio_api)/(upload|file[=/]|proxy=|stream/|process_recording|vibe-|dev/|component_server|runs|run-history|deep_link)"
)
_FILE_KEYS = {"path", "url", "orig_name", "_type"}

PICKER_TEMPLATE = """
<label class="pv-drop">
  <input type="file" accept="image/jpeg,image/png,image/webp,image/bmp" aria-label="${label}">
  ${value ? `<img src="${value}" alt="the chosen picture">` : ""}
  <b>${name}</b>
  <span>${value ? "Another picture" : label}: drop it here, or tap to choose. At most ${megabytes} MB.</span>
</label>
<p class="pv-problem" role="alert">${problem}</p>
<div class="pv-examples">
{{#each examples}}
<button type="button" title="{{this.name}}"><img src="{{this.address}}" alt="demo picture: {{this.name}}"></button>
{{/each}}
</div>
"""

PICKER_SCRIPT = """
function escaped(name) {  // the template doesn't escape
  return name.replace(/[&<>"]/g, sign => `&#${sign.charCodeAt()};`);
}
function take(file) {
  if (!file) return;
  const shownName = escaped(file.name);
  if (file.size > props.megabytes * 1048576) {
    props.problem = `${shownName} has more than ${props.megabytes} MB.`;
    return;
  }
  const reader = new FileReader(), shown = new Image();
  reader.onload = () => shown.src = reader.result.replace(/^data:[^,]*,/, "data:image/any;base64,");
  shown.onload = () => choose(shown.src, file.name);
  shown.onerror = () => props.problem = `${shownName} is not an image that is read here (JPEG, PNG, WebP, BMP).`;
  reader.readAsDataURL(file);
}
function choose(address, name) {
  props.problem = "";
  props.name = escaped(name);
  props.value = address;
  trigger("upload");
}
element.addEventListener("change", event => { if (event.target.type === "file") take(event.target.files[0]); });
element.addEventListener("dragover", event => event.preventDefault());
element.addEventListener("drop", event => { event.preventDefault(); take(event.dataTransfer.files[0]); });
element.addEventListener("click", event => {
  const button = event.target.closest(".pv-examples button");
  if (!button) return;
  choose(button.querySelector("img").src, button.title);
});
"""

STYLE = """
.pv-drop { display: flex; flex-direction: column; align-items: center; gap: .5rem; padding: 1rem; cursor: pointer;
  border: 2px dashed var(--border-color-primary); border-radius: .5rem; text-align: center; }
.pv-drop:focus-within, .pv-drop:hover { border-color: var(--color-accent); }
.pv-drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.pv-drop img { max-height: 12rem; max-width: 100%; margin: 0; }
.pv-examples { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .5rem; }
.pv-examples button { padding: 0; margin: 0 !important; border: 1px solid var(--border-color-primary); line-height: 0;
  cursor: pointer; }
.pv-examples img { height: 4.5rem; width: auto; margin: 0; }
.pv-problem { color: #b3261e; margin: .5rem 0 0; overflow-wrap: anywhere; }
.dark .pv-problem { color: #ff8a80; }
.pv-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); gap: .6rem; }
.pv-grid figure { margin: 0; font-size: .8rem; overflow-wrap: anywhere; }
.pv-grid img { width: 100%; aspect-ratio: 1 / 2; object-fit: contain; background: var(--background-fill-secondary);
  margin: 0; }
.pv-drawings { columns: 22rem auto; column-gap: 2rem; }
.pv-drawn { margin: 0 0 1rem; break-inside: avoid; }
.pv-drawn img { width: auto; max-width: 100%; max-height: 40rem; background: white; padding: .3rem; margin: 0; }
.pv-drawn figcaption { font-size: .9rem; margin-bottom: .3rem; }
@media (max-width: 640px) {
  .gradio-container main { padding-left: .5rem !important; padding-right: .5rem !important; }
  .pv-drop { padding: .5rem; }
  .pv-drop img { max-height: 8rem; }
  .pv-drawings { columns: 1; }
}
footer { display: none !important; }
"""


class RequestError(ValueError):
    """What is wrong with a request, in words that its sender may read."""


def read_picture(text: Any) -> np.ndarray:
    """The picture in a data URL.

    Args:
        text: What a request sent: a data URL of a JPEG, PNG, BMP or WebP of at most 8 MiB and 16 megapixels.

    Returns:
        uint8 (height, width, 3) RGB.

    Raises:
        RequestError: It is anything else. A path or an address is never followed.
    """
    if not isinstance(text, str) or not (start := _DATA_URL.match(text)):
        raise RequestError("This is no picture: expected the content of an image file.")
    if len(text) - start.end() > 4 * -(-MAX_UPLOAD_BYTES // 3):
        raise RequestError(f"The picture is too large: at most {MAX_UPLOAD_BYTES // 2**20} MB.")
    try:
        content = base64.b64decode(text[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("The picture arrived damaged; send it again.") from None
    try:
        return decode_image(content, "The picture", MAX_UPLOAD_PIXELS)
    except ValueError as error:
        raise RequestError(str(error)) from error


def data_url(content: bytes, kind: str) -> str:
    """A file's content as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(image: np.ndarray, height: int = 256) -> str:
    """A picture as the data URL of a JPEG, at most `height` pixels high."""
    picture = Image.fromarray(image)
    picture.thumbnail((4 * height, height))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return data_url(file.getvalue(), "jpeg")


def results_html(rows: Iterable[tuple[str, float, str]]) -> str:
    """The ranked gallery: (address of the picture, cosine similarity, lines of its name), the most similar first."""
    figures = "".join(
        f'<figure><img src="{address}" alt="rank {rank}"><figcaption><b>{rank}</b> · {similarity:.5f}<br>'
        f"{html.escape(name).replace(chr(10), '<br>')}</figcaption></figure>"
        for rank, (address, similarity, name) in enumerate(rows, start=1)
    )
    return f'<p>Most similar first; the number is the cosine similarity.</p><div class="pv-grid">{figures}</div>'


def drawings_html(drawings: Iterable[tuple[str, bytes]]) -> str:
    """Figures under their captions: (caption, content of a JPEG file)."""
    figures = "".join(
        f'<figure class="pv-drawn"><figcaption>{html.escape(caption)}</figcaption>'
        f'<img src="{data_url(content, "jpeg")}" alt="{html.escape(caption)}"></figure>'
        for caption, content in drawings
    )
    return f'<h3>What the model sees</h3><div class="pv-drawings">{figures}</div>'


def problem_html(problem: str) -> str:
    """What is wrong, for the page."""
    return f'<p class="pv-problem" role="alert">{html.escape(problem)}</p>'


class Gate:
    """ASGI middleware: only small requests that name no file reach the app, and its doors to files are shut.

    Gradio opens uploads, and fetches addresses, that the data of any request name, before the app's own code runs.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """Hands a request on, or answers it with 400, 403 or 413."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if _CLOSED.search(scope["path"]):
            await _refuse(send, 403, "This app takes and gives no files.")
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > MAX_REQUEST_BYTES:
                await _refuse(send, 413, "The request is too large.")
                return
        if not _is_plain(bytes(body)):
            await _refuse(send, 400, "Requests must be JSON, and may name no files.")
            return
        sent = False

        async def replay() -> dict:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)


def _is_plain(body: bytes) -> bool:
    """Whether a request's body is empty or JSON that holds nothing that Gradio takes for a file."""
    if not body:
        return True
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if _FILE_KEYS & value.keys():
                return False
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return True


async def _refuse(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": text}).encode()})
