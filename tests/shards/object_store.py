"""An S3 service on a free port, and a proxy before it that cuts connections, shortens bodies, and answers wrongly."""

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
from moto.server import ThreadedMotoServer

Fault = str  # "", "cut", "short", "error", "flip"


class _Proxy(BaseHTTPRequestHandler):
    target: int
    plan: Callable[[str], Fault]
    requests: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def answer(self) -> None:
        fault = type(self).plan(self.path) if self.command == "GET" else ""
        self.requests.append(f"{self.command} {self.path} {fault}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection("127.0.0.1", self.target)
        upstream.request(self.command, self.path, body, {k: v for k, v in self.headers.items() if k != "Connection"})
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        length = (
            response.getheader("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        )
        if fault == "error":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":  # a body that is whole by its header, and yet too short
            content = content[: len(content) // 2]
            length = str(len(content))
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer


class Store:
    """A bucket `data` behind the proxy."""

    def __init__(self, port: int, proxy: type[_Proxy]) -> None:
        self.port, self._proxy = port, proxy

    def faults(self, plan: Callable[[str], Fault]) -> None:
        """Sets what happens to GET requests from now on, by their path."""
        self._proxy.plan = staticmethod(plan)
        self._proxy.requests.clear()

    def requests(self, pattern: str = "") -> list[str]:
        """Requests since the faults were set."""
        return [request for request in self._proxy.requests if re.search(pattern, request)]

    def put(self, folder: Path, name: str) -> str:
        """Uploads a folder and returns its address."""
        system = fsspec.filesystem("s3")
        for path in folder.iterdir():
            system.pipe_file(f"data/{name}/{path.name}", path.read_bytes())
        return f"s3://data/{name}"


def environment(port: int) -> dict[str, str]:
    """What points s3fs at the proxy, in this process and in others."""
    return {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_MAX_ATTEMPTS": "1",
    }


@contextmanager
def object_store() -> Iterator[Store]:
    """Starts both servers; the caller sets the environment."""
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    target = moto.get_host_and_port()[1]
    proxy = type("Proxy", (_Proxy,), {"target": target, "plan": staticmethod(lambda _: ""), "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), proxy)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("PUT", "/data", headers={"Content-Length": "0"})
    connection.getresponse().read()
    connection.close()
    try:
        yield Store(server.server_port, proxy)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        moto.stop()
