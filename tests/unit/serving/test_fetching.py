"""Fetching images by URL: only from listed hosts, never from non-public addresses."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from socket import AddressFamily
from typing import Any

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving import fetching
from serving.fetching import ImageFetcher, NotFetchedError, is_public

pytestmark = pytest.mark.anyio

IMAGE = b"\xff\xd8" + b"x" * 1000
HOST = "images.example"


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "2002:7f00:1::", "64:ff9b:1::1",
    ],
)  # fmt: skip
def test_non_public_addresses(address: str) -> None:
    assert not is_public(address)


class Names(AbstractResolver):
    """Resolves host names from a list of answers per name, each used once except the last, which is repeated."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.requested = answers, list[str]()

    async def resolve(self, host: str, port: int = 0, family: AddressFamily = AddressFamily.AF_INET) -> list[Any]:
        self.requested.append(host)
        answers = self.answers[host]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [{"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        """There is nothing to close."""


def certificate(directory: Path) -> ssl.SSLContext:
    """An SSL context with a self-signed certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = directory / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


class Server:
    """An https server on loopback, and the paths requested from it."""

    port: int
    requested: list[str]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server()
    server.requested = []

    def route(path: str, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.RouteDef:
        async def record(request: web.Request) -> web.StreamResponse:
            server.requested.append(request.path)
            return await answer(request)

        return web.get(path, record)

    async def image(request: web.Request) -> web.Response:
        return web.Response(body=IMAGE)

    async def large(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(IMAGE)
        return response

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b"x")
            await asyncio.sleep(0.05)
        return response

    async def packed(request: web.Request) -> web.Response:
        return web.Response(body=IMAGE, headers={"Content-Encoding": "gzip"})

    async def to(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": request.query["at"]} if request.query else {})

    async def loop(request: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "/loop"})

    app = web.Application()
    answers = {"image": image, "large": large, "drip": drip, "packed": packed, "to": to, "loop": loop}
    app.add_routes([route(f"/{name}", answer) for name, answer in answers.items()])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=certificate(tmp_path))
    await site.start()
    server.port = runner.addresses[0][1]
    yield server
    await runner.cleanup()


def fetcher(
    server: Server, names: Names | None = None, allowed: Callable[[str], bool] = lambda address: address == "127.0.0.1"
) -> ImageFetcher:
    """A fetcher that allows loopback, where the test server runs, and does not verify certificates."""
    hosts = [f"{HOST}:{server.port}", f"inside.example:{server.port}"]
    return ImageFetcher(
        hosts,
        50_000,
        resolver=names or Names({HOST: ["127.0.0.1"], "inside.example": ["10.0.0.1"]}),
        allowed=allowed,
        ssl=False,
    )


async def test_images_of_listed_hosts_are_fetched(server: Server) -> None:
    root = f"https://{HOST}:{server.port}"
    assert await fetcher(server).fetch(f"{root}/image") == IMAGE
    assert await fetcher(server).fetch(f"{root}/to?at=/image") == IMAGE
    assert await fetcher(server).fetch(f"{root}/packed") == IMAGE, "compressed content is not decompressed"


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example:{port}/image", "https://other.example:{port}/image", "https://images.example/image",
        "https://127.0.0.1:{port}/image", "https://2130706433:{port}/image", "https://[::1]:{port}/image",
        "https://user@images.example:{port}/image", "https://images.example:{port}@127.0.0.1/image",
        "file:///etc/passwd", "https://", "https://images.example:port/image",
    ],
)  # fmt: skip
async def test_other_urls_are_refused_before_resolving_their_host(server: Server, url: str) -> None:
    names = Names({HOST: ["127.0.0.1"]})
    with pytest.raises(NotFetchedError):
        await fetcher(server, names).fetch(url.format(port=server.port))
    assert (names.requested, server.requested) == ([], [])


async def test_ip_addresses_are_refused_even_if_listed(server: Server) -> None:
    for host in ("127.0.0.1", "127.1", "2130706433"):
        listed = ImageFetcher([f"{host}:{server.port}"], 1000, allowed=lambda _: True, ssl=False)
        with pytest.raises(NotFetchedError):
            await listed.fetch(f"https://{host}:{server.port}/image")
    assert server.requested == []


async def test_listed_names_with_private_addresses_are_refused(server: Server) -> None:
    names = Names({HOST: ["127.0.0.1"]})
    with pytest.raises(NotFetchedError):
        await fetcher(server, names, is_public).fetch(f"https://{HOST}:{server.port}/image")
    assert (names.requested, server.requested) == ([HOST], [])


async def test_the_connection_goes_to_the_checked_address(server: Server) -> None:
    names = Names({HOST: ["127.0.0.1", "10.0.0.1"]})
    assert await fetcher(server, names).fetch(f"https://{HOST}:{server.port}/image") == IMAGE
    assert names.requested == [HOST], "the name is not resolved a second time, to another address"


@pytest.mark.parametrize("target", ["https://inside.example:{port}/image", "http://images.example/", "/loop", ""])
async def test_redirects_are_checked_like_the_first_url(server: Server, target: str) -> None:
    at = target.format(port=server.port)
    with pytest.raises(NotFetchedError):
        await fetcher(server).fetch(f"https://{HOST}:{server.port}/to?at={at}")
    assert server.requested.count("/loop") <= fetching.MAX_REDIRECTS
    assert "/image" not in server.requested


async def test_large_slow_and_missing_content_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TOTAL_SECONDS", 0.5)
    for name in ("large", "drip", "nothing"):
        with pytest.raises(NotFetchedError):
            await fetcher(server).fetch(f"https://{HOST}:{server.port}/{name}")


async def test_an_untrusted_certificate_is_refused(server: Server) -> None:
    names = Names({HOST: ["127.0.0.1"]})
    checking = ImageFetcher([f"{HOST}:{server.port}"], 50_000, resolver=names, allowed=lambda _: True)
    with pytest.raises(NotFetchedError):
        await checking.fetch(f"https://{HOST}:{server.port}/image")
    assert server.requested == []
