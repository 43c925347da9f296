"""Stores on this machine: moto's S3 server and a plain web server with ranges, both with faults on demand."""

import contextlib
import threading
import time
from urllib.parse import parse_qs, unquote

from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "photos"
DENIED = (
    b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>InvalidAccessKeyId</Code><Message>no</Message></Error>"""
)
BUSY = b"""<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>no</Message></Error>"""


class Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args):
        pass


class Server:
    """A WSGI app on a free port.

    Attributes:
        asked: (method, path) of all requests.
        faults: functions of (path) -> a fault or None, asked in order; see `later`.
    """

    def __init__(self, app):
        self.app, self.asked, self.faults = app, [], []
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=Quiet)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @contextlib.contextmanager
    def fault(self, kind, times=10**9, where="", method=""):
        """Requests whose path contains `where` fail, so many times: `busy`, `denied`, `slow`, `cut`, `gone`."""
        left = [times]

        def now(asked, path):
            if where in path and method in asked and left[0] > 0:
                left[0] -= 1
                return kind
            return None

        self.faults.append(now)
        try:
            yield
        finally:
            self.faults.remove(now)

    def answer(self, environ, start):
        method, path = environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"])
        self.asked.append((method, path))
        kind = next((kind for fault in self.faults if (kind := fault(method, path))), None)
        if kind in ("busy", "denied", "gone"):
            status = {"busy": "503 Busy", "denied": "403 Forbidden", "gone": "404 Not Found"}[kind]
            body = BUSY if kind == "busy" else DENIED if kind == "denied" else b""
            start(status, [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]
        if kind == "slow":
            time.sleep(2)
        if kind == "cut":
            return self.cut(environ, start)
        return self.app(environ, start)

    def cut(self, environ, start):
        """Half of the body, and the connection is closed."""
        body = b"".join(self.app(environ, start))

        def halves():
            yield body[: len(body) // 2]
            raise ConnectionAbortedError

        return halves()

    def count(self, method, where=""):
        return sum(method == asked and where in path for asked, path in self.asked)


class S3(Server):
    """moto's server with one bucket."""

    def __init__(self):
        super().__init__(DomainDispatcherApplication(create_backend_app))
        self.backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        self.backend.create_bucket(BUCKET, "us-east-1")

    def put(self, name, content):
        """Without a request: these take moto ten times as long."""
        self.backend.put_object(BUCKET, name, content)

    def names(self, prefix=""):
        return sorted(key for key in self.backend.get_bucket(BUCKET).keys if key.startswith(prefix))

    def remove(self, prefix):
        for name in self.names(prefix):
            self.backend.delete_object(BUCKET, name)

    def put_folder(self, folder, prefix):
        """A folder's files as objects; returns the URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


def web(folder):
    """A web server of a folder's files, with ranges; `ranges` off makes it ignore them."""

    def app(environ, start):
        try:
            content = (folder / unquote(environ["PATH_INFO"]).lstrip("/")).read_bytes()
        except OSError:
            start("404 Not Found", [("Content-Length", "0")])
            return [b""]
        status, headers = "200 OK", [("Accept-Ranges", "bytes"), ("ETag", f'"{hash(content)}"')]
        if wanted := environ.get("HTTP_RANGE"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, content = "206 Partial Content", content[int(first) : int(last) + 1 if last else None]
        start(status, [*headers, ("Content-Length", str(len(content)))])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else content]

    return Server(app)


class Pages(Server):
    """An S3 server of which objects can only be listed, so many; moto takes seconds for a page of so long a list."""

    ENTRY = "<Contents><Key>many/{0:06}.png</Key><ETag>&quot;{0:032x}&quot;</ETag><Size>{1}</Size></Contents>"

    def __init__(self, count):
        self.number = count
        super().__init__(self.page)

    def page(self, environ, start):
        first = int(parse_qs(environ["QUERY_STRING"]).get("continuation-token", ["0"])[0])
        after = min(self.number, first + 1000)
        token = f"<NextContinuationToken>{after}</NextContinuationToken>" if after < self.number else ""
        entries = "".join(self.ENTRY.format(n, n % 7) for n in range(first, after))
        body = f"<ListBucketResult>{token}{entries}</ListBucketResult>".encode()
        start("200 OK", [("Content-Type", "text/xml"), ("Content-Length", str(len(body)))])
        return [body]
