"""A stand-in of the Hugging Face Hub's API on loopback, for one user's models.

The Hub's own client talks to it. It takes large files by Git LFS, since Xet, by which
the client sends them where it can, has no server to be had: HF_HUB_DISABLE_XET is set.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

USER, TOKEN, READ_TOKEN = "somebody", "hf_that_may_write", "hf_that_may_read"


class Hub:
    """Repositories in memory: whether each is private, its files and commits."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.large: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def make(self, repo: str, *, private: bool = True, **files: bytes) -> None:
        self.private[repo], self.files[repo], self.commits[repo] = private, files, []

    def environment(self, home: object, token: str = TOKEN) -> dict[str, str]:
        """Return the variables by which the Hub's client finds it."""
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
        }

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        files = self.files[repo]
        for line in lines:
            given = line["value"]
            match line["key"]:
                case "header":
                    self.commits[repo].append(given["summary"])
                case "file":
                    assert given["encoding"] == "base64"
                    files[given["path"]] = base64.b64decode(given["content"])
                case "lfsFile":
                    files[given["path"]] = self.large[given["oid"]]
                case "deletedFile":
                    del files[given["path"]]
        return self.sha(repo)

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{len(self.commits[repo])}".encode()).hexdigest()

    def info(self, repo: str) -> dict[str, Any]:
        siblings = [{"rfilename": name} for name in self.files[repo]]
        known = {"id": repo, "modelId": repo, "private": self.private[repo]}
        return {**known, "sha": self.sha(repo), "siblings": siblings, "tags": []}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
            for name, data in self.files[repo].items()
        ]


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name in ("do_GET", "do_HEAD", "do_POST", "do_PUT"):
                return self._answer
            raise AttributeError(name)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self) -> None:
            body = self._body()
            path = unquote(urlsplit(self.path).path).strip("/").split("/")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            match self.command, path:
                case "PUT", ["large", oid]:  # which Amazon's S3 is for the Hub
                    assert not token
                    assert hashlib.sha256(body).hexdigest() == oid
                    hub.large[oid] = body
                    self._send({})
                case _ if token not in (TOKEN, READ_TOKEN):
                    self._send({"error": "Invalid username or password."}, 401)
                case "POST", _ if token == READ_TOKEN:
                    self._send({"error": "You don't have the rights."}, 403)
                case "POST", ["api", "repos", "create"]:
                    self._create(json.loads(body))
                case "POST", ["api", "validate-yaml"]:
                    assert json.loads(body)["content"].startswith("---\n")
                    self._send({"errors": [], "warnings": []})
                case "POST", ["api", "models", user, name, "preupload", "main"]:
                    self._send({"files": self._modes(json.loads(body)["files"])})
                case "POST", [user, name, "info", "lfs", "objects", "batch"]:
                    self._send({"transfer": "basic", "objects": self._objects(body)})
                case "POST", ["api", "models", user, name, "commit", "main"]:
                    lines = [json.loads(line) for line in body.splitlines()]
                    oid = hub.commit(f"{user}/{name}", lines)
                    url = f"{hub.address}/{user}/{name}/commit/{oid}"
                    self._send({"success": True, "commitOid": oid, "commitUrl": url})
                case _, ["api", "models", user, name, *_] | [user, name, *_] if (
                    f"{user}/{name}" not in hub.files
                ):
                    missing = {"X-Error-Code": "RepoNotFound"}
                    self._send({"error": "Repository not found"}, 404, missing)
                case "GET", ["api", "models", user, name, "tree", _]:
                    self._send(hub.tree(f"{user}/{name}"))
                case "GET", ["api", "models", user, name, *_]:
                    self._send(hub.info(f"{user}/{name}"))
                case (("GET" | "HEAD"), [user, name, "resolve", _, *parts]):
                    repo = f"{user}/{name}"
                    data = hub.files[repo]["/".join(parts)]
                    marks = {"X-Repo-Commit": hub.sha(repo), "ETag": f'"{_oid(data)}"'}
                    self._send(data, 200, marks)
                case _:
                    raise AssertionError(f"{self.command} {self.path}")

        def _create(self, given: dict[str, Any]) -> None:
            repo = f"{given['organization']}/{given['name']}"
            if given["organization"] != USER:
                self._send({"error": "You don't have the rights."}, 403)
            elif repo in hub.files:
                url = f"{hub.address}/{repo}"
                self._send({"error": "It exists already", "url": url}, 409)
            else:
                hub.make(repo, private=given["visibility"] == "private")
                self._send({"url": f"{hub.address}/{repo}", "name": repo})

        def _modes(self, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
            modes = ("regular", "lfs")
            return [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                }
                for file in given
            ]

        def _objects(self, body: bytes) -> list[dict[str, Any]]:
            return [
                {
                    **file,
                    "actions": {
                        "upload": {"href": f"{hub.address}/large/{file['oid']}"}
                    },
                }
                for file in json.loads(body)["objects"]
            ]

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(
            self,
            found: object,
            status: int = 200,
            headers: dict[str, str] | None = None,
        ) -> None:
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    return Handler
