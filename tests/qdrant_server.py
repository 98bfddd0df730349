"""A Qdrant server small enough to read, for qdrant-client over real HTTP: the few REST calls that `search.py` makes.

It searches exactly, wants a key if it is given one, refuses what a strict server refuses (filters without a payload
index, bodies over 32 MB), and fails on request.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

MAX_BODY = 32 * 2**20


class Refused(Exception):
    def __init__(self, status: int, message: str):
        self.status, self.message = status, message


@dataclass
class Collection:
    size: int
    indexed: dict[str, str] = field(default_factory=dict)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    payloads: dict[int, dict[str, Any]] = field(default_factory=dict)

    def upsert(self, points: list[dict[str, Any]]) -> None:
        if any(len(point["vector"]) != self.size for point in points):
            raise Refused(400, f"Wrong input: Vector dimension error: expected dim: {self.size}")
        for point in points:
            vector = np.array(point["vector"], np.float32)
            self.vectors[point["id"]] = vector / np.linalg.norm(vector)
            self.payloads[point["id"]] = point["payload"]

    def matching(self, wanted: dict[str, Any] | None) -> list[int]:
        def holds(payload: dict[str, Any], condition: dict[str, Any]) -> bool:
            key, match = condition["key"], condition["match"]
            if key not in self.indexed:
                raise Refused(400, f'Bad request: Index required but not found for "{key}"')
            return payload.get(key) in (match["any"] if "any" in match else [match["value"]])

        wanted = wanted or {}
        return [
            point
            for point, payload in self.payloads.items()
            if all(holds(payload, condition) for condition in wanted.get("must") or [])
            and not any(holds(payload, condition) for condition in wanted.get("must_not") or [])
        ]

    def query(self, request: dict[str, Any]) -> dict[str, Any]:
        points = self.matching(request.get("filter"))
        query = np.array(request["query"]["nearest"], np.float32)
        scores = {point: float(self.vectors[point] @ query / np.linalg.norm(query)) for point in points}
        nearest = sorted(points, key=lambda point: (-scores[point], point))[: request["limit"]]
        return {"points": [{"id": point, "version": 0, "score": scores[point]} for point in nearest]}


class QdrantServer(ThreadingHTTPServer):
    """Collections by name; `requests` tells each call as (method, path, body, headers).

    `faults` are what the next requests that match get, each once: (pattern of "METHOD path", action); the action is a
    status, "cut" (done, but the line dies before the answer), seconds to wait, or None to let it pass.
    """

    daemon_threads = True

    def __init__(self, key: str | None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key = key
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.collections: dict[str, Collection] = {}
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []
        self.faults: list[tuple[str, int | str | float | None]] = []

    def bodies(self, call: str) -> list[Any]:
        """Bodies of the requests whose "METHOD path" matches."""
        return [body for method, path, body, _ in self.requests if re.search(call, f"{method} {path}")]

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up waiting is no error
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    server: QdrantServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def handle_one(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length) or b"null")
        path = self.path.split("?")[0]
        call = f"{self.command} {path}"
        action = None
        with self.server.lock:
            self.server.requests.append((self.command, self.path, body, dict(self.headers.items())))
            for fault in self.server.faults:
                if re.search(fault[0], call):
                    self.server.faults.remove(fault)
                    action = fault[1]
                    break
        if isinstance(action, float):
            time.sleep(action)
        try:
            if self.server.key is not None and self.headers.get("api-key") != self.server.key:
                raise Refused(401, "Must provide an API key or an Authorization bearer token")
            if isinstance(action, int):
                raise Refused(action, "Service internal error: told to fail")
            if length > MAX_BODY:
                raise Refused(413, f"Payload error: JSON payload ({length} bytes) is larger than allowed")
            with self.server.lock:
                status, answer = 200, {"result": self.answer(call, body), "status": "ok", "time": 0.0}
        except Refused as error:
            status, answer = error.status, {"status": {"error": error.message}, "time": 0.0}
        if action == "cut":
            self.close_connection = True
            return
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = handle_one

    def answer(self, call: str, body: Any) -> Any:
        collections = self.server.collections
        method, _, name, *rest = call.replace(" /", "/").split("/")
        match method, "/".join(rest):
            case "GET", "exists":
                return {"exists": name in collections}
            case "PUT", "":
                if body["vectors"]["distance"] != "Cosine" or name in collections:
                    raise Refused(409, f"Wrong input: Collection `{name}` already exists!")
                collections[name] = Collection(body["vectors"]["size"])
                return True
        if name not in collections:
            raise Refused(404, f"Not found: Collection `{name}` doesn't exist!")
        match method, "/".join(rest):
            case "DELETE", "":
                return bool(collections.pop(name))
            case "PUT", "index":
                collections[name].indexed[body["field_name"]] = body["field_schema"]
            case "PUT", "points":
                collections[name].upsert(body["points"])
            case "POST", "points/count":
                return {"count": len(collections[name].matching(body.get("filter")))}
            case "POST", "points/query/batch":
                return [collections[name].query(request) for request in body["searches"]]
            case _:
                raise Refused(404, f"no such call: {call}")
        return {"operation_id": 0, "status": "completed"}


@contextmanager
def qdrant_server(key: str | None = None) -> Iterator[QdrantServer]:
    """A server on a free port of this machine, while the block runs."""
    server = QdrantServer(key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
