"""A small Hugging Face hub on this machine, for the real client to ask."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants


def commit_of(text):
    return hashlib.sha1(text.encode()).hexdigest()


class Hub:
    """Repositories in memory, behind the routes that a download asks for.

    Attributes:
        files: of each repository and revision, path -> bytes.
        refusals: of a name, the status and error code that requests whose path holds it are answered with.
        served: files sent, in order, as `owner/model/path`.
        asked: paths of all requests.
        tokens: how each of them was authorized.
    """

    def __init__(self):
        self.files, self.refusals, self.served, self.asked, self.tokens = {}, {}, [], [], []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository, files, revision="main"):
        self.files[repository, revision] = files
        self.files[repository, commit_of(repository + revision)] = files

    def answer(self, path):
        """(status, headers, body) for a path."""
        for name, (status, code) in self.refusals.items():
            if name in path:
                return status, {"X-Error-Code": code} if code else {}, b""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        repository = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if not any(repository == known for known, _ in self.files):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[:2] == ["api", "models"]:
            what, revision = parts[4:6] if len(parts) > 4 else ("revision", "main")
        else:
            what, revision = parts[2:4]
        files = self.files.get((repository, revision))
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = revision if len(revision) == 40 else commit_of(repository + revision)
        if what == "resolve":
            body = files["/".join(parts[4:])]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'}, body
        listing = [{"type": "file", "path": p, "size": len(b), "oid": commit_of(p)} for p, b in files.items()]
        answer = {"id": repository, "sha": commit, "siblings": []} if what == "revision" else listing
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()

    def handler(self):
        world = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                path = urlsplit(self.path).path
                status, headers, body = world.answer(path)
                world.asked.append(path)
                world.tokens.append(self.headers["Authorization"])
                if self.command == "GET" and "ETag" in headers:
                    owner, model, _, _, file = path.strip("/").split("/", 4)
                    world.served.append(f"{owner}/{model}/{file}")
                self.send_response(status)
                for key, value in {**headers, "Content-Length": len(body)}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        return Handler


def point_to(monkeypatch, endpoint):
    """Let the client take `endpoint` for the hub; it reads the variable for that only once."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
