"""A small Hub on loopback, for tests: the part of the protocol that huggingface_hub uses to push and pull models.

Repositories are chains of commits in memory. Regular files travel inside the commit (NDJSON); ``.safetensors`` and
``.bin`` go by Git LFS, as on the Hub, and are downloaded from another host name without a token, as from its CDN.
Xet is not spoken: set ``HF_HUB_DISABLE_XET=1`` for the client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS = (".safetensors", ".bin")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Blob:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """What the client compares with: SHA-256 for LFS, git's blob hash otherwise."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, Blob]
    message: str


@dataclass
class Repo:
    name: str
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main") -> Commit:
        """A new commit on a branch, with these files in it."""
        oid = hashlib.sha1(f"{self.name} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append(Commit(oid, files, message))
        self.branches[branch] = oid
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag or an id names."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass(frozen=True)
class Request:
    """What a client sent, for the tests to look at."""

    method: str
    url: str
    host: str
    authorization: str | None
    body: bytes


class RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Server(ThreadingHTTPServer):
    """Knows its connections, so that none outlives it."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)


class HubServer:
    """The server; a context manager.

    Args:
        users: Access token to user name; a user may read and write the repositories of that name.
        echo_token: Repeat the request's token in every refusal, as a careless proxy does.
    """

    def __init__(self, users: dict[str, str], echo_token: bool = False) -> None:
        self.users, self.echo_token = users, echo_token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Drop every connection and stop listening."""
        if self._thread.is_alive():
            self._http.shutdown()
            for connection in list(self._http.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._http.server_close()
            self._thread.join()

    def seed(self, name: str, files: dict[str, bytes], private: bool = False, gated: bool = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[name] = Repo(name, private, gated)
        repo.commit({path: Blob(data, path.endswith(_LFS)) for path, data in files.items()}, "initial commit")
        return repo


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that http.server calls

        def _answer(self) -> None:
            body = self._read()
            authorization = self.headers.get("Authorization")
            with hub.lock:
                hub.requests.append(Request(self.command, self.path, self.headers.get("Host", ""), authorization, body))
                try:
                    status, headers, data = _Call(hub, self.command, self.path, authorization, body).run()
                except RefusalError as refusal:
                    told = f" You sent {authorization}" if hub.echo_token and authorization else ""
                    status, headers = refusal.status, dict(refusal.headers)
                    headers["X-Error-Message"] = refusal.message + told
                    data = json.dumps({"error": refusal.message + told}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

    return Handler


Answer = tuple[int, dict[str, str], bytes]


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


class _Call:
    """One request: finds its route, checks the token, answers."""

    def __init__(self, hub: HubServer, method: str, url: str, authorization: str | None, body: bytes) -> None:
        parts = urlsplit(url)
        self.hub, self.method, self.path, self.body = hub, method, parts.path, body
        self.query = parse_qs(parts.query)
        self.user: str | None = None
        if authorization is not None:
            self.user = hub.users.get(authorization.removeprefix("Bearer "))
            self.bad_token = self.user is None
        else:
            self.bad_token = False

    def run(self) -> Answer:
        # Objects are fetched by their hash alone, as from a CDN with signed addresses.
        if self.bad_token and not self.path.startswith("/objects/"):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        for methods, pattern, route in _ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.method in methods.split():
                return route(self, *(unquote(group) if group is not None else "" for group in match.groups()))
        raise RefusalError(404, f"no such page: {self.method} {self.path}")

    @property
    def _json_body(self) -> Any:
        return json.loads(self.body or b"{}")

    def _repo(self, name: str, write: bool = False, content: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        owner = self.user is not None and name.split("/")[0] == self.user
        if repo is None or (repo.private and not owner):
            if self.user is None:
                raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and not owner:
            raise RefusalError(401 if self.user is None else 403, f"Access to model {name} is restricted.", "GatedRepo")
        if write and self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        if write and not owner:
            raise RefusalError(403, "You don't have the rights to write to this repository")
        return repo

    @staticmethod
    def _commit(repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> Answer:
        if self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        return _json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> Answer:
        if self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        asked = self._json_body
        owner = asked.get("organization") or self.user
        name = f"{owner}/{asked['name']}"
        if owner != self.user:
            raise RefusalError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return _json({"error": "You already created this model repo", **url}, 409)
        private = asked.get("private") is True or asked.get("visibility") == "private"
        repo = self.hub.repos[name] = Repo(name, private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n*.bin filter=lfs\n", False)}, "initial commit")
        return _json(url)

    def may_write(self, name: str) -> Answer:
        self._repo(name, write=True)
        return _json({})

    def validate(self) -> Answer:
        text = self._json_body["content"]
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        errors, warnings = [], []
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            data, errors = {}, [{"message": f"invalid YAML: {error}"}]
        if data is None:
            data, warnings = {}, [{"message": "empty or missing yaml metadata in repo card"}]
        bases = data.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not _MODEL_ID.fullmatch(base):
                errors.append({"message": f'"base_model" with value "{base}" is not valid. Use a model id.'})
        return _json({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> Answer:
        files = self._commit(self._repo(name, write=True), revision).files
        answer = []
        for asked in self._json_body["files"]:
            path = asked["path"]
            known = {"oid": files[path].oid} if path in files else {}
            mode = "lfs" if path.endswith(_LFS) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return _json({"files": answer})

    def lfs_batch(self, name: str) -> Answer:
        self._repo(name, write=True)
        objects = []
        for asked in self._json_body["objects"]:
            oid, size = asked["oid"], asked["size"]
            actions = {"upload": {"href": f"{self.hub.endpoint}/objects/{oid}"}}
            objects.append({"oid": oid, "size": size, **({} if oid in self.hub.objects else {"actions": actions})})
        return _json({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> Answer:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(422, "the content does not have this hash")
        self.hub.objects[oid] = self.body
        return 200, {}, b""

    def get_object(self, oid: str) -> Answer:
        stored = [b for r in self.hub.repos.values() for c in r.commits for b in c.files.values() if b.oid == oid]
        if not stored:
            raise RefusalError(404, "no such object")
        return 200, {"ETag": f'"{oid}"', "Content-Type": "application/octet-stream"}, stored[0].data

    def commit(self, name: str, revision: str) -> Answer:
        repo = self._repo(name, write=True)
        head = self._commit(repo, revision)
        files, message = dict(head.files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head.oid):
                    raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise RefusalError(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise RefusalError(400, f"unknown operation {item['key']}")
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repo.branches)
            revision = f"refs/pr/{number}"
        elif revision not in repo.branches:
            raise RefusalError(400, f"{revision} is not a branch")
        made = repo.commit(files, message, revision)
        url = f"{self.hub.endpoint}/{name}"
        pull = {"pullRequestUrl": f"{url}/discussions/{revision.rpartition('/')[2]}"} if "/pr/" in revision else {}
        return _json({"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", **pull})

    def branch(self, name: str, branch: str) -> Answer:
        repo = self._repo(name, write=True)
        if branch in repo.branches:
            raise RefusalError(409, f"Reference refs/heads/{branch} already exists")
        repo.branches[branch] = self._commit(repo, self._json_body.get("startingPoint") or "main").oid
        return _json({})

    def tag(self, name: str, revision: str) -> Answer:
        repo, tag = self._repo(name, write=True), self._json_body["tag"]
        if tag in repo.tags:
            raise RefusalError(409, f"Tag {tag} already exists")
        repo.tags[tag] = self._commit(repo, revision).oid
        return _json({})

    def refs(self, name: str) -> Answer:
        repo = self._repo(name)

        def rows(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": ref, "ref": f"refs/{kind}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]

        return _json({"branches": rows(repo.branches, "heads"), "tags": rows(repo.tags, "tags"), "converts": []})

    def info(self, name: str, revision: str) -> Answer:
        repo = self._repo(name)
        commit = self._commit(repo, revision or "main")
        rows = [{"rfilename": path} for path in commit.files]
        access = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
        counts = {"downloads": 0, "likes": 0, "tags": [], "createdAt": "2026-01-01T00:00:00.000Z"}
        return _json(
            {"_id": name, "id": name, "modelId": name, "sha": commit.oid, "siblings": rows, **access, **counts}
        )

    def tree(self, name: str, revision: str, folder: str) -> Answer:
        commit = self._commit(self._repo(name), revision)
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        rows: dict[str, dict[str, Any]] = {}
        for path, blob in commit.files.items():
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            for depth in range(1, len(inner)):
                parent = prefix + "/".join(inner[:depth])
                if recursive or depth == 1:
                    rows[parent] = {"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
            if recursive or len(inner) == 1:
                lfs = {"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 134}} if blob.lfs else {}
                rows[path] = {"type": "file", "path": path, "oid": blob.oid[:40], "size": len(blob.data), **lfs}
        if prefix and not rows:
            raise RefusalError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return _json(list(rows.values()))

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        commit = self._commit(self._repo(name, content=True), revision)
        blob = commit.files.get(path)
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        if not blob.lfs:
            return 200, headers, blob.data
        headers |= {"X-Linked-ETag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.data))}
        # Another host name for the same server: a client must not send its token there.
        return 302, {**headers, "Location": f"http://localhost:{self.hub.port}/objects/{blob.oid}"}, b""


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", r"/api/whoami-v2", _Call.whoami),
    ("POST", r"/api/repos/create", _Call.create),
    ("POST", r"/api/validate-yaml", _Call.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Call.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Call.commit),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", _Call.branch),
    ("POST", rf"/api/models/{_NAME}/tag/([^/]+)", _Call.tag),
    ("GET", rf"/api/models/{_NAME}/auth-check/write", _Call.may_write),
    ("GET", rf"/api/models/{_NAME}/refs", _Call.refs),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(/.*)?", _Call.tree),
    ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Call.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Call.lfs_batch),
    ("PUT", r"/objects/([0-9a-f]{64})", _Call.put_object),
    ("GET HEAD", r"/objects/([0-9a-f]{64})", _Call.get_object),
    ("GET HEAD", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Call.resolve),
]
