"""A Hugging Face Hub on the loopback address, for tests of real downloads and uploads without the internet.

The client reads ``HF_ENDPOINT`` when it is imported, so a test runs its code in a subprocess with
``HubServer.environment()``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

# Repository id -> revision -> file name -> content, or a path to it.
Repositories = Mapping[str, Mapping[str, Mapping[str, bytes | Path]]]

_RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
_PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)")
_COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
_STORE = re.compile(r"/store/(?P<oid>[0-9a-f]{64})")
_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")


# Who may upload, as a token tells: its account's name, or that it may only read.
WRITER, READER, ACCOUNT = "hf_writer", "hf_reader", "you"


def folder_files(folder: Path) -> dict[str, Path]:
    """The files of a saved model, as a repository holds them."""
    return {f.relative_to(folder).as_posix(): f for f in sorted(folder.rglob("*")) if f.is_file()}


class HubServer:
    """Serves repositories and records what was asked.

    Use as a context manager. ``requests`` holds ``(method, path)`` of every request in order. Uploads need
    the token ``WRITER``, and go to ``repositories`` under ``ACCOUNT``; ``stored`` holds the large files by
    their hash, ``private`` the ids of repositories that were made so.
    """

    def __init__(self, repositories: Repositories) -> None:
        self.repositories = {
            repo: {name: dict(files) for name, files in revisions.items()}
            for repo, revisions in repositories.items()
        }
        self.stored: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.commits: list[str] = []
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a subprocess that knows this Hub only and keeps its cache in ``home``."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": WRITER,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def repositories_asked_for(self) -> set[str]:
        """Ids of the repositories of which anything was asked."""
        matches = (_RESOLVE.match(path) or _INFO.match(path) for _, path in self.requests)
        return {match["repo"] for match in matches if match}

    def files_fetched(self) -> set[str]:
        """Names of the files whose content was asked for, of whichever repository."""
        matches = (_RESOLVE.match(path) for method, path in self.requests if method == "GET")
        return {match["file"] for match in matches if match}

    def commit(self, repo: str, revision: str) -> str:
        """The 40 digits that stand for a revision's commit."""
        made = sum(committed == repo for committed in self.commits)
        return hashlib.sha1(f"{repo}@{revision}{made or ''}".encode()).hexdigest()

    def find_revision(self, repo: str, revision: str) -> Mapping[str, bytes | Path] | None:
        """The files of a branch or commit; None where there is no such revision."""
        for name, files in self.repositories[repo].items():
            if revision in (name, self.commit(repo, name)):
                return files
        return None

    def name_of(self, repo: str, revision: str) -> str:
        """The branch that a branch name or commit means."""
        return next(n for n in self.repositories[repo] if revision in (n, self.commit(repo, n)))


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keeps the tests' output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/api/validate-yaml":
            self._send_json({"errors": [], "warnings": []})
        elif not self._may_write():
            return
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := _PREUPLOAD.fullmatch(path):
            self._tell_upload_modes(json.loads(body))
        elif match := _BATCH.fullmatch(path):
            self._tell_where_to_store(json.loads(body))
        elif match := _COMMIT.fullmatch(path):
            self._commit(match["repo"], match["revision"], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse("RepoNotFound")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        match = _STORE.fullmatch(path)
        if match is None or hashlib.sha256(body).hexdigest() != match["oid"]:
            self._send_json({"error": "the content is not what was announced"}, 400)
            return
        self.hub.stored[match["oid"]] = body
        self._send_json({})

    def _may_write(self) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == WRITER:
            return True
        status, said = (
            (403, "You may only read") if token == READER else (401, "Invalid username or password.")
        )
        self._send_json({"error": said}, status)
        return False

    def _create(self, wanted: Mapping[str, str]) -> None:
        owner = wanted.get("organization") or ACCOUNT
        repo = f"{owner}/{wanted['name']}"
        if owner != ACCOUNT:
            said = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            self._send_json({"error": said}, 403)
            return
        status = 409 if repo in self.hub.repositories else 200
        self.hub.repositories.setdefault(repo, {"main": {}})
        if wanted.get("private") or wanted.get("visibility") == "private":
            self.hub.private.add(repo)
        self._send_json({"url": f"{self.hub.url}/{repo}"}, status)

    def _tell_upload_modes(self, wanted: Mapping[str, list[Mapping[str, str]]]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in wanted["files"]
        ]
        self._send_json({"files": modes})

    def _tell_where_to_store(self, wanted: Mapping[str, list[dict[str, object]]]) -> None:
        objects = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.url}/store/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, revision: str, lines: list[dict[str, dict[str, str]]]) -> None:
        files = self.hub.repositories[repo][revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.commits.append(repo)
        commit = self.hub.commit(repo, revision)
        self._send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if match := _RESOLVE.fullmatch(path):
            self._send_file(match["repo"], match["revision"], match["file"])
        elif match := _TREE.fullmatch(path):
            self._send_tree(match["repo"], match["revision"], match["folder"])
        elif match := _INFO.fullmatch(path):
            self._send_info(match["repo"], match["revision"] or "main")
        else:
            self._refuse("RepoNotFound")

    def _files(self, repo: str, revision: str) -> Mapping[str, bytes | Path] | None:
        if repo not in self.hub.repositories:
            self._refuse("RepoNotFound")
            return None
        files = self.hub.find_revision(repo, revision)
        if files is None:
            self._refuse("RevisionNotFound")
        return files

    def _send_file(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        commit = {"X-Repo-Commit": self.hub.commit(repo, self.hub.name_of(repo, revision))}
        if name not in files:
            self._refuse("EntryNotFound", commit)
            return
        content = _read(files[name])
        headers = commit | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
            return
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _send_tree(self, repo: str, revision: str, folder: str | None) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        inside = [name for name in files if folder is None or name.startswith(f"{folder}/")]
        if folder is not None and not inside:
            self._refuse("EntryNotFound")
            return
        entries = [
            {
                "type": "file",
                "path": name,
                "size": len(_read(files[name])),
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
            for name in inside
        ]
        self._send_json(entries)

    def _send_info(self, repo: str, revision: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        commit = self.hub.commit(repo, self.hub.name_of(repo, revision))
        siblings = [{"rfilename": name} for name in files]
        self._send_json({"id": repo, "modelId": repo, "sha": commit, "tags": [], "siblings": siblings})

    def _refuse(self, code: str, headers: Mapping[str, str] | None = None) -> None:
        status = 401 if code == "RepoNotFound" else 404  # the real Hub does not tell missing from private
        self._send(status, b"", {"X-Error-Code": code, **(headers or {})})

    def _send_json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _read(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()
