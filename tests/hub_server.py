"""A Hub small enough to read, for huggingface_hub's real client: it pushes to it and reads back over real HTTP.

It keeps what the tests ask for: repositories, public and private; tokens that may write, only read, or are someone
else's; files small and large (LFS); commits that are there with all their files or not at all; and faults on request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# token: (user, may write)
TOKENS = {"hf_alice": ("alice", True), "hf_alice_reads": ("alice", False), "hf_bob": ("bob", True)}
LFS_SIZE = 10_000_000  # bytes; larger files, and all weights, go the LFS way as on the Hub


@dataclass
class Repo:
    """Commits are whole trees, {path: content, or the SHA-256 of an LFS object as str}; the last one is `main`."""

    private: bool
    commits: list[dict[str, bytes | str]] = field(default_factory=lambda: [{".gitattributes": b"# weights: LFS\n"}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])

    def sha(self, index: int = -1) -> str:
        tree = {
            path: content if isinstance(content, str) else git_oid(content)
            for path, content in self.commits[index].items()
        }
        number = index % len(self.commits)
        return hashlib.sha1(json.dumps([number, tree], sort_keys=True).encode()).hexdigest()

    def tree(self, revision: str) -> dict[str, bytes | str] | None:
        shas = ["main" if revision == "main" else self.sha(index) for index in range(len(self.commits))]
        return self.commits[len(shas) - 1 - shas[::-1].index(revision)] if revision in shas else None


@dataclass
class Fault:
    """What the next `times` requests that match get, once `until` is set: a status, or a line that dies."""

    pattern: str
    action: (
        int | str | None
    )  # "cut": half-way through the larger of request and answer; "lost": done, but not answered
    times: int = 1
    until: threading.Event | None = None


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store_url = (
            f"http://localhost:{self.server_address[1]}"  # another host to the client, as the Hub's store is
        )
        self.repos: dict[str, Repo] = {}  # by "models/alice/name"
        self.uploads: dict[str, bytes] = {}  # by SHA-256
        self.objects: dict[str, bytes] = {}  # the verified ones of them
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD path", with the range asked for
        self.lock = threading.Lock()

    def fail(self, pattern: str, action: int | str | None, times: int = 1) -> None:
        self.faults.append(Fault(pattern, action, times))

    def hold(self, pattern: str) -> threading.Event:
        """The next request that matches is answered when the event is set."""
        self.faults.append(Fault(pattern, None, until=threading.Event()))
        return self.faults[-1].until

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None

    def content(self, stored: bytes | str) -> bytes:
        return self.objects[stored] if isinstance(stored, str) else stored


@contextmanager
def running_hub() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        request = f"{self.command} {path} {self.headers.get('Range', '')}".strip()
        self.server.requests.append(request)
        fault = self.server.next_fault(request)
        if fault is not None and fault.until is not None:
            fault.until.wait(timeout=60)
        self.cut = fault is not None and fault.action == "cut"
        self.lost = fault is not None and fault.action == "lost"
        body = self.read_body()
        if body is None:
            return
        if fault is not None and isinstance(fault.action, int):
            return self.answer(fault.action, {"error": "a fault on request"})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.user, self.may_write = TOKENS.get(token, (None, False))
        if token and self.user is None:
            return self.answer(401, {"error": "Invalid user token"})
        for method, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return route(self, body, *match.groups(), **{k: v[0] for k, v in parse_qs(url.query).items()})
        return self.answer(404, {"error": f"no route for {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def read_body(self) -> bytes | None:
        """The request's body; None, with the line closed half-way, if it is to be cut."""
        if self.cut and self.command in ("POST", "PUT"):
            self.rfile.read(min(int(self.headers.get("Content-Length") or 64), 65536) // 2)
            self.close_connection = True
            self.connection.close()
            return None
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, body: dict | list | bytes = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.lost:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if isinstance(body, dict) and "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self.close_connection = True

    def log_message(self, *args) -> None:
        pass

    # Routes

    def repo(self, key: str, write: bool = False) -> Repo | None:
        """The repository, or None and the answer that the Hub gives to who may not see or write it."""
        repo, owner = self.server.repos.get(key), key.split("/")[1]
        if repo is None or (repo.private and self.user != owner):
            status = 401 if self.user is None else 404
            self.answer(status, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and self.user is None:
            self.answer(401, {"error": "Invalid username or password."})
        elif write and not (self.may_write and self.user == owner):
            self.answer(403, {"error": f"You don't have the rights to write to {key}"})
        else:
            return repo
        return None

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        key = f"{wanted.get('type') or 'model'}s/{name}"
        url = f"{self.server.url}/{name if key.startswith('models/') else key}"
        if not self.may_write or name.split("/")[0] != self.user:
            return self.answer(403, {"error": f"You don't have the rights to create {name}"})
        if key in self.server.repos:
            return self.answer(409, {"error": "You already created this repo", "url": url})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.server.repos[key] = Repo(private)
        return self.answer(200, {"url": url, "name": name})

    def whoami(self, body: bytes) -> None:
        if self.user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        return self.answer(200, {"name": self.user, "type": "user", "orgs": []})

    def validate_yaml(self, body: bytes) -> None:
        block = re.match(r"(---\n)(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(block[2]) if block else {}
            texts = [data.get(name, "") for name in ("license", "library_name", "pipeline_tag")]
            lists = [data.get(name, []) for name in ("tags", "datasets", "model-index", "configs")]
            wrong = not all(isinstance(text, str) for text in texts) or not all(isinstance(x, list) for x in lists)
        except (yaml.YAMLError, AttributeError):
            wrong = True
        if wrong:
            return self.answer(400, {"errors": [{"message": "not the metadata of a card"}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, key: str, revision: str = "main", **_: str) -> None:
        if (repo := self.repo(key)) is None:
            return None
        if (tree := repo.tree(revision)) is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        name = key.split("/", 1)[1]
        siblings = [{"rfilename": path} for path in tree]
        sha = repo.sha() if revision == "main" else revision
        about = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}
        return self.answer(200, about | {"likes": 0})

    def auth_check(self, body: bytes, key: str, write: str | None = None, **_: str) -> None:
        if self.repo(key, write=write is not None) is not None:
            self.answer(200, {})

    def entry(self, path: str, stored: bytes | str) -> dict:
        content = self.server.content(stored)
        row = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        return row | (
            {"lfs": {"oid": stored, "size": len(content), "pointerSize": 130}} if isinstance(stored, str) else {}
        )

    def tree(self, body: bytes, key: str, revision: str, folder: str | None = None, recursive: str = "", **_) -> None:
        if (repo := self.repo(key)) is None:
            return None
        if (tree := repo.tree(revision)) is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        rows, prefix = {}, f"{folder}/" if folder else ""
        for path, stored in tree.items():
            child, *deeper = path.removeprefix(prefix).split("/")
            if not path.startswith(prefix):
                continue
            if deeper and recursive.lower() != "true":
                rows[child] = {"type": "directory", "path": prefix + child, "size": 0, "oid": git_oid(child.encode())}
            else:
                rows[path] = self.entry(path, stored)
        missing = {"error": "no such folder"}
        return (
            self.answer(200, list(rows.values())) if rows else self.answer(404, missing, X_Error_Code="EntryNotFound")
        )

    def paths_info(self, body: bytes, key: str, revision: str) -> None:
        asked = self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if "json" in asked else parse_qs(body.decode()).get("paths", [])
        if (repo := self.repo(key)) is not None:
            tree = repo.tree(revision) or {}
            self.answer(200, [self.entry(path, tree[path]) for path in paths if path in tree])

    def preupload(self, body: bytes, key: str, revision: str, **_: str) -> None:
        if (repo := self.repo(key, write=True)) is None:
            return
        tree, files = repo.commits[-1], []
        for file in json.loads(body)["files"]:
            lfs = file["size"] > LFS_SIZE or file["path"].endswith((".safetensors", ".parquet"))
            stored = tree.get(file["path"])
            oid = stored if stored is None or isinstance(stored, str) else git_oid(stored)
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer(200, {"files": files})

    def lfs_batch(self, body: bytes, name: str) -> None:
        key = name if name.startswith("datasets/") else f"models/{name}"
        if self.repo(key, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            url = f"{self.server.store_url}/objects/{wanted['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            objects.append(wanted if wanted["oid"] in self.server.objects else wanted | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": f"these {len(body)} bytes are not {oid}"})
        self.server.uploads[oid] = body
        return self.answer(200, {})

    def verify_object(self, body: bytes, oid: str) -> None:
        if len(self.server.uploads.get(oid, b"")) != json.loads(body)["size"]:
            return self.answer(404, {"error": f"no object {oid}"})
        self.server.objects[oid] = self.server.uploads[oid]
        return self.answer(200, {})

    def commit(self, body: bytes, key: str, revision: str, **_: str) -> None:
        if (repo := self.repo(key, write=True)) is None:
            return None
        tree, message = dict(repo.commits[-1]), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.objects:
                tree[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile" and value["path"] in tree:
                del tree[value["path"]]
            else:
                return self.answer(400, {"error": f"can't commit {line['key']} {value['path']}"})
        repo.commits.append(tree)
        repo.messages.append(message)
        commit = {
            "commitUrl": f"{self.server.url}/{key}/commit/{repo.sha()}",
            "commitOid": repo.sha(),
            "pullRequestUrl": None,
        }
        return self.answer(200, commit)

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name if name.startswith("datasets/") else f"models/{name}")
        if repo is None:
            return None
        tree = repo.tree(revision)
        if tree is None:
            return self.answer(404, {"error": "no such revision"}, X_Error_Code="RevisionNotFound")
        sha = repo.sha() if revision == "main" else revision
        if path not in tree:
            return self.answer(404, {"error": "no such file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        stored = tree[path]
        if isinstance(stored, str):
            linked = {"X_Linked_Etag": f'"{stored}"', "X_Linked_Size": str(len(self.server.objects[stored]))}
            return self.answer(302, Location=f"{self.server.store_url}/objects/{stored}", X_Repo_Commit=sha, **linked)
        return self.send_range(stored, ETag=f'"{git_oid(stored)}"', X_Repo_Commit=sha)

    def get_object(self, body: bytes, oid: str) -> None:
        self.send_range(self.server.objects[oid], ETag=f'"{oid}"')

    def send_range(self, content: bytes, **headers: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.answer(200, content, Accept_Ranges="bytes", **headers)
        start, end = int(wanted[1]), int(wanted[2] or len(content) - 1)
        span = f"bytes {start}-{end}/{len(content)}"
        return self.answer(206, content[start : end + 1], Content_Range=span, **headers)


REPO = r"((?:models|datasets)/[\w.-]+/[\w.-]+)"
NAME = r"((?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/{REPO}", Handler.info),
    ("GET", f"/api/{REPO}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/{REPO}/auth-check(/write)?", Handler.auth_check),
    ("GET", f"/api/{REPO}/tree/([^/]+)(?:/(.*))?", Handler.tree),
    ("POST", f"/api/{REPO}/paths-info/([^/]+)", Handler.paths_info),
    ("POST", f"/api/{REPO}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/{REPO}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/objects/([0-9a-f]{64})", Handler.put_object),
    ("POST", "/objects/([0-9a-f]{64})/verify", Handler.verify_object),
    ("GET", "/objects/([0-9a-f]{64})", Handler.get_object),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
