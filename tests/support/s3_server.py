"""An S3 server on this machine that fails on demand: moto's server in a process of its own, behind injected faults.

`python -m tests.support.s3_server` serves until its standard input ends; the lines `stop` and `start` on it close and
reopen the port, with all objects kept.
"""

import io
import json
import logging
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

TIMEOUT_S = 1.0
"""Seconds after which clients with `S3Server.options` give a request up."""

_BUCKET = "bucket"
_FAULTS = "/-faults"
_REQUESTS = "/-requests"
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong with a request, each with a probability; at most one of them does."""

    refused: float = 0.0
    """The answer is 503, and the request is not carried out."""
    unanswered: float = 0.0
    """The answer is 500, although the request is carried out."""
    stalled_before: float = 0.0
    """The request is carried out after the client has given up."""
    stalled_after: float = 0.0
    """The request is carried out at once, but the answer comes after the client has given up."""
    only: str = ""
    """A regular expression that `METHOD path` must match."""
    times: int | None = None
    """The number of faults after which there are none."""
    seed: int = 0


FLAKY = Faults(refused=0.05, unanswered=0.05, stalled_before=0.0025, stalled_after=0.0025, seed=1)


class S3Server:
    """The server, as tests control it from their process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", __name__],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._port = int(self._said())
        self._call("PUT", f"/{_BUCKET}")

    @property
    def options(self) -> dict[str, Any]:
        """For `Registry(server.url(…), **server.options)`."""
        return {
            "config": {
                "endpoint": f"http://127.0.0.1:{self._port}",
                "region": "us-east-1",
                "access_key_id": "nobody",
                "secret_access_key": "nothing",
            },
            "client_options": {"allow_http": True, "timeout": f"{TIMEOUT_S:g}s"},
            "retry_config": {
                "max_retries": 4,
                "retry_timeout": timedelta(seconds=10),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=10),
                    "max_backoff": timedelta(milliseconds=100),
                    "base": 2,
                },
            },
        }

    def url(self, prefix: str) -> str:
        return f"s3://{_BUCKET}/{prefix}"

    def fail(self, faults: Faults) -> None:
        """Fail like this from now on. Requests that were stalled before are over when this returns."""
        self._call("POST", _FAULTS, json.dumps(asdict(faults)).encode())

    def recover(self) -> None:
        """Stop failing."""
        self.fail(Faults())

    def requests(self) -> Counter[str]:
        """`METHOD path` → the number of requests, failed ones included."""
        return Counter(json.loads(self._call("GET", _REQUESTS)))

    def stop(self) -> None:
        """Refuse connections."""
        self._tell("stop")

    def start(self) -> None:
        """Accept connections again after `stop`, on the same port and with the same objects."""
        self._tell("start")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _call(self, method: str, path: str, content: bytes | None = None) -> bytes:
        request = Request(f"http://127.0.0.1:{self._port}{path}", content, method=method)
        with urlopen(request, timeout=10) as answer:
            return bytes(answer.read())

    def _tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        assert self._said() == command

    def _said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the S3 server ended with status {self._process.wait()}"
        return line


@contextmanager
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        yield server
    finally:
        server.close()


_STALL_S = 1.5 * TIMEOUT_S

WSGIApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class _Faulty:
    """WSGI middleware that lets requests fail."""

    def __init__(self, application: WSGIApplication) -> None:
        self._application = application
        # moto's threads share dictionaries without locks: it compares and puts in two steps.
        self._one_at_a_time = threading.Lock()
        self._drawing = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._busy: set[int] = set()
        """Threads with a request."""
        self._set(Faults())

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        content = environ["wsgi.input"].read(length)
        if len(content) < length:  # its client was killed
            return _answer(start_response, "400 Bad Request")
        environ["wsgi.input"] = io.BytesIO(content)
        path = environ["PATH_INFO"]
        if path == _FAULTS:
            self._set(Faults(**json.loads(content)))
            while self._busy:
                time.sleep(0.01)
            return _answer(start_response, "200 OK")
        if path == _REQUESTS:
            return _answer(start_response, "200 OK", json.dumps(self._requests).encode())
        fault = self._draw(f"{environ['REQUEST_METHOD']} {path}")
        self._busy.add(threading.get_ident())
        try:
            return self._carry_out(environ, start_response, fault)
        finally:
            self._busy.remove(threading.get_ident())

    def _carry_out(
        self, environ: dict[str, Any], start_response: Callable[..., Any], fault: str | None
    ) -> Iterable[bytes]:
        if fault == "refused":
            return _answer(start_response, "503 Slow Down")
        if fault == "stalled_before":
            time.sleep(_STALL_S)
        with self._one_at_a_time:
            if fault == "unanswered":
                list(self._application(environ, lambda *_: None))
                return _answer(start_response, "500 Internal Server Error")
            answer = list(self._application(environ, start_response))
        if fault == "stalled_after":
            time.sleep(_STALL_S)
        return answer

    def _set(self, faults: Faults) -> None:
        with self._drawing:
            self._faults = faults
            self._left = sys.maxsize if faults.times is None else faults.times
            self._rng = random.Random(faults.seed)

    def _draw(self, request: str) -> str | None:
        with self._drawing:
            self._requests[request] += 1
            if self._left == 0 or not re.search(self._faults.only, request):
                return None
            drawn = self._rng.random()
            for name in ("refused", "unanswered", "stalled_before", "stalled_after"):
                drawn -= getattr(self._faults, name)
                if drawn < 0:
                    self._left -= 1
                    return name
            return None


def _answer(start_response: Callable[..., Any], status: str, content: bytes = b"") -> Iterable[bytes]:
    start_response(status, [("Content-Length", str(len(content)))])
    return [content]


def _serve() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_: Any) -> None:
            """Nothing."""

    # moto trips over a part that arrives, stalled, after its upload was given up; nobody waits for the answer.
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    application = _Faulty(DomainDispatcherApplication(create_backend_app))

    def start(port: int) -> BaseWSGIServer:
        server = make_server("127.0.0.1", port, application, threaded=True, request_handler=Quiet)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    server = start(0)
    port = server.port
    print(port, flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            server.shutdown()
            server.server_close()
        else:
            server = start(port)
        print(line.strip(), flush=True)


if __name__ == "__main__":
    _serve()
