"""A small Hub: an HTTP server that speaks what `huggingface_hub` asks of one, and fails on demand.

Repositories are lists of commits in memory; every commit holds the whole tree. Requests are logged,
so that tests can count what was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


WRITE, READ = "hf_write", "hf_read"
USER, OTHER = "me", "somebody"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".gguf")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Fault:
    """What goes wrong with requests that match.

    Attributes:
        method (`str`): HTTP method.
        path (`str`): Regular expression, searched in the path.
        times (`int`): Requests that it befalls.
        status (`int`, *optional*): Answer with this status.
        headers (`dict[str, str]`): And these headers.
        drop (`str`): `"before"`: hang up in the middle of the request, undone. `"after"`: do what
            is asked, then hang up. `"half"`: hang up in the middle of the answer's body.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str = ""


@dataclass(frozen=True)
class Blob:
    """Content of a file in a commit."""

    data: bytes
    lfs: bool

    @property
    def sha1(self) -> str:
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}")
        return "\n".join([*lines, f"size {len(self.data)}", ""]).encode()


@dataclass
class Repo:
    """A repository: commits by id, branches by name."""

    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: dict[str, list[str]] = field(default_factory=dict)

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        names = [f"{path}:{blob.sha1}" for path, blob in sorted(tree.items())]
        seed = "\n".join([message, self.branches.get(branch, ""), str(len(self.commits)), *names])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.messages[oid] = tree, message
        self.branches[branch] = oid
        self.history.setdefault(branch, []).append(oid)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        tree = self.commits[self.branches[revision]]
        return {path: blob.data for path, blob in tree.items()}


class Answer(Exception):
    """Ends the handling of a request."""

    def __init__(self, status: int, message: str = "", code: str = "", body: Any = None) -> None:
        self.status, self.message, self.code = status, message, code
        self.body = {"error": message} if body is None else body


class Hub:
    """The state of the server, and the server."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.sent: Counter[str] = Counter()  # bytes of file content sent, by path
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Hub]:
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()

    def fail(self, method: str, path: str, **how: Any) -> Fault:
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def count(self, method: str, path: str, status: int | None = None) -> int:
        """Requests that were answered like this."""
        return sum(
            m == method and re.search(path, p) is not None and status in (None, s)
            for m, p, s in self.log
        )

    def endpoints(self) -> Counter[str]:
        """What was asked, with the names taken out."""
        shapes: Counter[str] = Counter()
        for method, path, _ in self.log:
            path = re.sub(r"/(me|somebody)/[\w.-]+?(?=/|\.git|$)", "/{repo}", urlsplit(path).path)
            path = re.sub(r"/[0-9a-f]{40,64}(?=/|$)", "/{oid}", path)
            path = re.sub(r"(/resolve)/[^/]+/.*", r"\1/{revision}/{file}", path)
            path = re.sub(
                r"/(tree|commit|preupload|branch|revision)/[^/]+", r"/\1/{revision}", path
            )
            path = re.sub(r"(/collections)/[^/]+/[^/]+", r"\1/{slug}", path)
            shapes[f"{method} {path}"] += 1
        return shapes

    def commits_of(self, repo: str, branch: str = "main") -> list[str]:
        """Messages of a branch's commits, oldest first, without the first, empty one."""
        found = self.repos[repo]
        return [found.messages[oid] for oid in found.history.get(branch, [])][branch == "main" :]


# (method, pattern of the path) -> method of Handler, called with the groups of the pattern
ROUTES: list[tuple[str, str, str]] = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", r"/api/models/([^/]+/[^/]+)", "info"),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
    ("GET", r"/api/models/([^/]+/[^/]+)/refs", "refs"),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
    ("POST", r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
    ("POST", r"/api/collections", "create_collection"),
    ("GET", r"/api/collections/([^/]+/[^/]+)", "get_collection"),
    ("POST", r"/api/collections/([^/]+/[^/]+)/items?", "add_item"),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    ("HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_GET(self) -> None:
        self.handle_one("GET")

    do_HEAD = lambda self: self.handle_one("HEAD")  # noqa: E731
    do_POST = lambda self: self.handle_one("POST")  # noqa: E731
    do_PUT = lambda self: self.handle_one("PUT")  # noqa: E731

    def handle_one(self, method: str) -> None:
        fault = self.fault(method)
        if fault and fault.drop == "before":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.hang_up(method)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault and fault.status:
            return self.reply(method, fault.status, {"error": "injected"}, fault.headers)
        try:
            with self.hub.lock:
                answer = self.route(method)
        except Answer as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            return self.reply(method, refusal.status, refusal.body, headers)
        if fault and fault.drop == "after":
            return self.hang_up(method)
        if isinstance(answer, tuple):
            return self.send_file(method, *answer, half=bool(fault and fault.drop == "half"))
        self.reply(method, 200, answer, {})

    def fault(self, method: str) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == method and re.search(fault.path, self.path):
                    fault.times -= 1
                    return fault
        return None

    def hang_up(self, method: str) -> None:
        self.hub.log.append((method, self.path, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reply(self, method: str, status: int, body: Any, headers: Mapping[str, str]) -> None:
        self.hub.log.append((method, self.path, status))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(data)

    def send_file(self, method: str, blob: Blob, commit: str, name: str, half: bool) -> None:
        """A file, whole or the range that is asked for."""
        data, status = blob.data, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, total = 0, len(data)
        if wanted:
            first = int(wanted[1])
            data = data[first : int(wanted[2]) + 1 if wanted[2] else None]
            status = 206
        self.hub.log.append((method, self.path, status))
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{blob.sha256 if blob.lfs else blob.sha1}"')
        self.send_header("X-Repo-Commit", commit)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        self.end_headers()
        if method == "HEAD":
            return
        if half:
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.hub.sent[name] += len(data)
        self.wfile.write(data)

    def route(self, method: str) -> Any:
        path = urlsplit(self.path).path
        for wanted, pattern, name in ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                handler: Callable[..., Any] = getattr(self, name)
                return handler(*map(unquote, match.groups()))
        raise Answer(404, f"no route for {method} {path}")

    # who asks, and for what

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def token(self) -> str | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in (WRITE, READ):
            raise Answer(401, "Invalid credentials in Authorization header")
        return given or None

    def must_write(self, namespace: str) -> None:
        token = self.token()
        if token is None:
            raise Answer(401, "Invalid username or password.")
        if token != WRITE or namespace != USER:
            raise Answer(403, f"You don't have the rights to write under the namespace {namespace}")

    def repo(self, name: str) -> Repo:
        token, repo = self.token(), self.hub.repos.get(name)
        if repo is None or (repo.private and token is None):
            status = 404 if token else 401
            raise Answer(status, "Repository not found", "RepoNotFound")
        return repo

    def at(self, name: str, revision: str) -> tuple[Repo, str]:
        repo = self.repo(name)
        oid = repo.resolve(revision)
        if oid is None:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid

    # the endpoints

    def whoami(self) -> Any:
        if self.token() is None:
            raise Answer(401, "Invalid username or password.")
        return {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}}

    def create_repo(self) -> Any:
        owner = self.json.get("organization") or USER
        self.must_write(owner)
        name = f"{owner}/{self.json['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            body = {"error": "You already created this model repo", "url": url}
            raise Answer(409, body["error"], body=body)
        repo = self.hub.repos[name] = Repo(private=self.json.get("visibility") == "private")
        repo.commit("main", {".gitattributes": Blob(ATTRIBUTES, lfs=False)}, "initial commit")
        return {"url": url, "name": name, "id": name}

    def validate_yaml(self) -> Any:
        text = self.json["content"]
        if not text.startswith("---\n") or "\n---\n" not in text[4:]:
            errors = [{"message": "no metadata"}]
            raise Answer(400, "Invalid metadata", body={"errors": errors, "warnings": []})
        return {"errors": [], "warnings": []}

    def info(self, name: str, revision: str = "main") -> Any:
        repo, oid = self.at(name, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        return {"id": name, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings}

    def tree(self, name: str, revision: str) -> Any:
        repo, oid = self.at(name, revision)
        rows = []
        for path, blob in repo.commits[oid].items():
            row = {"type": "file", "oid": blob.sha1, "size": len(blob.data), "path": path}
            if blob.lfs:
                size = len(blob.data)
                row["lfs"] = {"oid": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
            rows.append(row)
        return rows

    def refs(self, name: str) -> Any:
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": oid}
            for branch, oid in self.repo(name).branches.items()
        ]
        return {"branches": branches, "converts": [], "tags": []}

    def create_branch(self, name: str, branch: str) -> Any:
        self.must_write(name.split("/")[0])
        repo, oid = self.at(name, self.json.get("startingPoint") or "main")
        if branch in repo.branches:
            raise Answer(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = oid
        return {}

    def preupload(self, name: str, revision: str) -> Any:
        self.must_write(name.split("/")[0])
        repo, oid = self.at(name, revision)
        rows = []
        for file in self.json["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            row = {"path": file["path"], "shouldIgnore": False}
            row["uploadMode"] = "lfs" if lfs else "regular"
            if known := repo.commits[oid].get(file["path"]):
                row["oid"] = known.sha256 if known.lfs else known.sha1
            rows.append(row)
        return {"files": rows}

    def lfs_batch(self, name: str) -> Any:
        self.must_write(name.split("/")[0])
        self.repo(name)
        objects = []
        for row in self.json["objects"]:
            entry = {"oid": row["oid"], "size": row["size"]}
            if row["oid"] not in self.hub.lfs:
                href = f"{self.hub.url}/lfs/{row['oid']}"
                entry["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Answer(400, "content and hash differ")
        self.hub.lfs[oid] = self.body
        return {}

    def lfs_verify(self, oid: str) -> Any:
        if oid not in self.hub.lfs:
            raise Answer(404, "no such object")
        return {}

    def commit(self, name: str, branch: str) -> Any:
        self.must_write(name.split("/")[0])
        repo = self.repo(name)
        if branch not in repo.branches:
            raise Answer(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            raise Answer(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(repo.commits[repo.branches[branch]])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    raise Answer(400, f"LFS pointer to a file that is not there: {value['path']}")
                tree[value["path"]] = Blob(self.hub.lfs[value["oid"]], lfs=True)
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
            else:
                raise Answer(400, f"unknown operation {line['key']}")
        oid = repo.commit(branch, tree, header["summary"])
        url = f"{self.hub.url}/{name}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url}

    def resolve(self, name: str, revision: str, path: str) -> Any:
        repo, oid = self.at(name, revision)
        if path not in repo.commits[oid]:
            raise Answer(404, "Entry not found", "EntryNotFound")
        return repo.commits[oid][path], oid, path

    def create_collection(self) -> Any:
        namespace, title = self.json["namespace"], self.json["title"]
        self.must_write(namespace)
        slug = f"{namespace}/{re.sub(r'[^a-z0-9]+', '-', title.lower())}-0123456789abcdef"
        if slug in self.hub.collections:
            body = {"error": "this collection exists", "slug": slug}
            raise Answer(409, body["error"], body=body)
        collection = {"slug": slug, "title": title, "owner": {"name": namespace}, "items": []}
        collection |= {"lastUpdated": DATE, "private": self.json["private"], "theme": "blue"}
        collection |= {"upvotes": 0, "description": self.json.get("description")}
        self.hub.collections[slug] = collection | {"position": 0}
        return self.hub.collections[slug]

    def get_collection(self, slug: str) -> Any:
        self.token()
        if slug not in self.hub.collections:
            raise Answer(404, "no such collection")
        return self.hub.collections[slug]

    def add_item(self, slug: str) -> Any:
        self.must_write(slug.split("/")[0])
        collection, item = self.get_collection(slug), self.json["item"]
        if any(known["id"] == item["id"] for known in collection["items"]):
            raise Answer(409, "this item is there already")
        row = {"_id": f"{len(collection['items']):024x}", "id": item["id"], "type": item["type"]}
        note = self.json.get("note")
        row |= {"position": len(collection["items"]), "note": {"text": note} if note else None}
        collection["items"].append(row)
        return collection


def let_out(monkeypatch: Any, cache: Any, hub: Hub | None = None) -> list[float]:
    """Let the client of this process reach local servers, without Xet, with a cache of its own.

    Args:
        monkeypatch (`pytest.MonkeyPatch`): Of the test.
        cache (`Path`): Folder of the cache.
        hub ([`Hub`], *optional*): Becomes the usual Hub, with a token that may write.

    Returns:
        `list[float]`: The seconds that anything asks to sleep; nothing does.
    """
    from huggingface_hub import constants

    waits: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("time.sleep", waits.append)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    if hub is not None:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", WRITE)
    return waits
