"""A hub on the loopback: it answers the HTTP requests of `huggingface_hub`, and keeps uploads in memory."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

from common.loopback import Answering, Loopback

TOKEN = "hf_of_the_test"
LARGE = 10_000_000  # bytes from which a file is uploaded by LFS, as text files are on the real hub

BINARY = (".safetensors", ".parquet", ".bin")  # by LFS whatever their size


def is_ignored(path: str, line: str) -> bool:
    """Whether a line of `.gitignore` names a path: a folder, or a file."""
    return path.startswith(line) if line.endswith("/") else path == line


def entries(repo: "Repo") -> list[dict[str, Any]]:
    """The files and folders of a repository."""
    folders = {str(parent) for path in repo.files for parent in PurePosixPath(path).parents} - {"."}
    made = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    for path, data in repo.files.items():
        made.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
    return made


@dataclass
class Repo:
    """A repository: its files at the last commit, and the summaries of its commits."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


class HubServer(Loopback):
    """Serves until it is closed. It cuts off the next `drop_uploads` uploads of large files in the middle."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.drop_uploads = 0
        super().__init__(_Handler)


class _Handler(Answering):
    server: HubServer

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def serve(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if path.startswith("/lfs/"):
            return self.large_file(path.removeprefix("/lfs/"))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        sent = self.body()
        if token and token != TOKEN:
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.command == "POST" and not token and path != "/api/validate-yaml":
            return self.answer({"error": "Unauthorized"}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "orgs": [], "auth": {}})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(sent))
        found = re.fullmatch(r"(?:/api/(models|datasets))?/(datasets/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?", path)
        assert found, path
        kind = "dataset/" if found[1] == "datasets" or found[2] else ""
        repo = hub.repos.get(kind + found[3])
        if repo is None or (repo.private and not token):
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.of_repo(repo, kind, found[3], found[4] or "", sent)

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def create(self, asked: dict[str, Any]) -> None:
        hub, kind = self.server, "dataset/" if asked.get("type") == "dataset" else ""
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{hub.url}/{'datasets/' if kind else ''}{name}"
        exists = kind + name in hub.repos
        if not exists:
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.repos[kind + name] = Repo(private=bool(private))
        self.answer({"url": url, "name": name, "id": name}, 409 if exists else 200)

    def of_repo(self, repo: Repo, kind: str, name: str, rest: str, sent: bytes) -> None:
        hub, (action, *_) = self.server, rest.split("/")
        if action == "preupload":
            asked = json.loads(sent)
            ignored = [line for line in asked.get("gitIgnore", "").splitlines() if line.strip()]
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["size"] >= LARGE or one["path"].endswith(BINARY) else "regular",
                    "shouldIgnore": any(map(partial(is_ignored, one["path"]), ignored)),
                    "oid": None,
                }
                for one in asked["files"]
            ]
            return self.answer({"files": files})
        if rest == "info/lfs/objects/batch":
            objects = [{"oid": one["oid"], "size": one["size"]} for one in json.loads(sent)["objects"]]
            for one in objects:
                if one["oid"] not in hub.blobs:
                    one["actions"] = {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        if action == "commit":
            return self.commit(repo, name, [json.loads(line) for line in sent.splitlines() if line.strip()])
        if action == "resolve":
            return self.resolve(repo, "/".join(rest.split("/")[2:]))
        if action == "tree":
            return self.tree(repo, unquote("/".join(rest.split("/")[2:])))
        if action == "paths-info":
            known = {one["path"]: one for one in entries(repo)}
            return self.answer([known[path] for path in parse_qs(sent.decode()).get("paths", []) if path in known])
        siblings = [{"rfilename": one} for one in repo.files]
        said = {"id": name, "sha": repo.sha, "private": repo.private, "siblings": siblings}
        self.answer({**said, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, repo: Repo, folder: str) -> None:
        found = [one for one in entries(repo) if not folder or one["path"].startswith(f"{folder}/")]
        if folder and not found:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha)
        recursive = "recursive=true" in self.path.lower()
        depth = folder.count("/") + bool(folder)
        self.answer([one for one in found if recursive or one["path"].count("/") == depth])

    def commit(self, repo: Repo, name: str, lines: list[dict[str, Any]]) -> None:
        made: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                made[value["path"]] = self.server.blobs[value["oid"]]
                repo.lfs.add(value["path"])
            elif line["key"] == "file":
                made[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "header":
                repo.commits.append(value["summary"])
        repo.files |= made
        self.answer(
            {"success": True, "commitOid": repo.sha, "commitUrl": f"{self.server.url}/{name}/commit/{repo.sha}"}
        )

    def resolve(self, repo: Repo, path: str) -> None:
        if path not in repo.files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha)
        data = repo.files[path]
        digest = hashlib.sha256(data).hexdigest()
        self.answer(data, ETag=f'"{digest}"', X_Repo_Commit=repo.sha, Accept_Ranges="bytes")

    def large_file(self, oid: str) -> None:
        hub = self.server
        if hub.drop_uploads:
            hub.drop_uploads -= 1
            self.rfile.read(1000)
            self.close_connection = True
            self.connection.close()
            return
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(b"digest differs", 400)
        hub.blobs[oid] = data
        self.answer()
