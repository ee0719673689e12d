"""A local server with the part of the Hub's HTTP API that uploads and downloads of huggingface_hub need.

Repositories are in memory. Writing needs a token, reading does not. Faults can be injected into any request, to test
uploads that are rejected or cut off.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


USER, TOKEN = "tester", "hf_of_the_tests"
# Suffixes of the files that the Hub stores outside git.
LARGE_FILES = (".safetensors", ".bin", ".png")
METADATA = re.compile(r"^---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """Replaces the response to requests with a matching method and path.

    Args:
        request: regular expression for `"METHOD /path"`.
        status: the answer's status; `None` closes the connection while the request is still being sent.
    """

    request: str
    status: int | None = None


@dataclass
class Repository:
    """The files of a repository, and the summaries of its commits."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        contents = [(path, hashlib.sha1(content).hexdigest()) for path, content in sorted(self.files.items())]
        return hashlib.sha1(repr((contents, self.commits)).encode()).hexdigest()


class HubServer(ThreadingHTTPServer):
    """The server; `endpoint` is the value for HF_ENDPOINT."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.faults = list(faults)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.validated: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        # Large files are on another host: huggingface_hub recognizes redirects to them by the host.
        self.storage = f"http://localhost:{self.server_address[1]}"


@contextmanager
def running_hub(faults: Sequence[Fault] = ()) -> Iterator[HubServer]:
    """Runs a server within the context."""
    with HubServer(faults) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.answer_one_of(
            (r"/api/whoami-v2", self.tell_user),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", self.tell_model),
            (r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.*))?", self.list_files),
            (r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.send_file),
            (r"/large/(\w+)", self.send_large),
        )

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer_one_of(
            (r"/api/validate-yaml", self.validate),
            (r"/api/repos/create", self.create),
            (r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.tell_upload_modes),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.tell_where_to_upload),
            (r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.commit),
        )

    def do_PUT(self) -> None:
        self.answer_one_of((r"/large/(\w+)", self.receive_large))

    def answer_one_of(self, *routes: tuple[str, Callable[..., None]]) -> None:
        path = unquote(urlsplit(self.path).path)
        for fault in self.server.faults:
            if re.search(fault.request, f"{self.command} {path}"):
                return self.refuse_as(fault)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for pattern, answer in routes:
            match = re.fullmatch(pattern, path)
            if match:
                return answer(*match.groups())
        self.send(404, {"error": f"no route for {path}"})

    def refuse_as(self, fault: Fault) -> None:
        if fault.status is None:
            self.rfile.read1(64)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send(fault.status, {"error": f"refused with {fault.status}"})

    # Reading

    def tell_user(self) -> None:
        if self.may_write():
            self.send(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def tell_model(self, repo_id: str) -> None:
        if repository := self.find(repo_id):
            siblings = [{"rfilename": path} for path in repository.files]
            self.send(200, {"id": repo_id, "sha": repository.sha, "siblings": siblings, "private": False, "tags": []})

    def list_files(self, repo_id: str, folder: str | None) -> None:
        if repository := self.find(repo_id):
            start = f"{folder}/" if folder else ""
            found = {path: content for path, content in repository.files.items() if path.startswith(start)}
            if folder and not found:
                return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
                for path, content in found.items()
            ]
            self.send(200, entries)

    def send_file(self, repo_id: str, path: str) -> None:
        repository = self.find(repo_id)
        if repository is None:
            return
        commit = {"X-Repo-Commit": repository.sha}
        if path not in repository.files:
            return self.send(404, {"error": "no such file"}, commit | {"X-Error-Code": "EntryNotFound"})
        content = repository.files[path]
        if not path.endswith(LARGE_FILES):
            return self.send(200, content, commit | {"ETag": f'"{_git_hash(content)}"'})
        oid = hashlib.sha256(content).hexdigest()
        linked = {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.server.storage}/large/{oid}",
        }
        self.send(302, b"", commit | linked)

    def send_large(self, oid: str) -> None:
        self.send(200, self.server.large[oid], {"ETag": f'"{oid}"'})

    # Writing

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        self.server.validated.append(content)
        errors = metadata_errors(content)
        if self.headers.get("Accept") == "text/plain":
            return self.send(400 if errors else 200, "\n".join(errors).encode())
        self.send(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def create(self) -> None:
        if self.may_write():
            wanted = json.loads(self.body)
            repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
            self.server.repositories.setdefault(repo_id, Repository())
            self.send(200, {"url": f"{self.server.endpoint}/{repo_id}"})

    def tell_upload_modes(self, repo_id: str) -> None:
        if self.may_write() and self.find(repo_id):
            modes = {True: "lfs", False: "regular"}
            names = [file["path"] for file in json.loads(self.body)["files"]]
            files = [
                {"path": name, "uploadMode": modes[name.endswith(LARGE_FILES)], "shouldIgnore": False}
                for name in names
            ]
            self.send(200, {"files": files})

    def tell_where_to_upload(self, repo_id: str) -> None:
        if self.may_write() and self.find(repo_id):
            objects = json.loads(self.body)["objects"]
            for wanted in objects:
                if wanted["oid"] not in self.server.large:
                    wanted["actions"] = {"upload": {"href": f"{self.server.storage}/large/{wanted['oid']}"}}
            self.send(200, {"transfer": "basic", "objects": objects})

    def receive_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.send(400, {"error": "what came has another hash"})
        self.server.large[oid] = self.body
        self.send(200, b"")

    def commit(self, repo_id: str) -> None:
        repository = self.find(repo_id) if self.may_write() else None
        if repository is None:
            return
        files = dict(repository.files)
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                summary = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            else:
                return self.send(400, {"error": f"unknown operation {key}"})
        repository.files = files
        repository.commits.append(summary)
        url = f"{self.server.endpoint}/{repo_id}/commit/{repository.sha}"
        self.send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url})

    # Helpers

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send(401, {"error": "Invalid username or password."})
        return False

    def find(self, repo_id: str) -> Repository | None:
        repository = self.server.repositories.get(repo_id)
        if repository is None:
            self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return repository

    def send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        is_json = not isinstance(content, bytes)
        body = json.dumps(content).encode() if is_json else content
        error = {"X-Error-Message": content["error"]} if is_json and "error" in content else {}
        self.send_response(status)
        for name, value in {**(headers or {}), **error}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json" if is_json else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Does not log."""


def metadata_errors(content: str) -> list[str]:
    """The Hub's response to a card's metadata, according to its documentation."""
    match = METADATA.match(content)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    errors = []
    for name in ("tags", "datasets", "metrics"):
        values = metadata.get(name, [])
        if not (isinstance(values, list) and all(isinstance(value, str) for value in values)):
            errors.append(f'"{name}" must be an array of strings')
    if not isinstance(metadata.get("license", ""), str) or metadata.get("license") == "":
        errors.append('"license" must be a string')
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            if not (result["task"].get("type") and result["dataset"].get("type") and result["dataset"].get("name")):
                errors.append('"model-index" results need a task type, and the type and name of a dataset')
            if not all(metric.get("type") and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index" metrics need a type and a value')
    return errors


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
