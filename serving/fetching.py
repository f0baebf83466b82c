"""Fetching images by URL, from hosts that the operator allows. By default there are none, and nothing is fetched.

Clients could make a server that fetches URLs reach its internal network. Therefore the URL must be https and its host
on the list; the host name is resolved once and must not resolve to a non-public address; the connection goes to the
checked address, whatever the name resolves to later; and redirects are checked in the same way. Size and time are
limited. All refusals look the same, so that they reveal nothing about the network.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Collection
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

NAT64 = ipaddress.IPv6Network("64:ff9b::/32")
"""IPv6 prefixes that map to IPv4 addresses, including private ones (RFC 6052, RFC 8215)."""
MAX_REDIRECTS = 2
CONNECT_SECONDS = 3.0
TOTAL_SECONDS = 10.0


class NotFetchedError(Exception):
    """A URL is not allowed, or its content exceeds the limits of size or time."""


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv4 address embedded in an IPv6 address is checked itself."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is not None:
            return is_public(str(embedded))
        if ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast


class ImageFetcher:
    """Fetches images from a list of hosts."""

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        *,
        resolver: AbstractResolver | None = None,
        allowed: Callable[[str], bool] = is_public,
        ssl: bool | aiohttp.Fingerprint = True,
    ) -> None:
        """Create a fetcher; this opens no connection.

        Args:
            hosts: allowed host names, with the port if it is not 443.
            max_bytes: maximum size of an image.
            resolver: resolves host names; None is the resolver of the system.
            allowed: whether a connection to an IP address is allowed.
            ssl: certificate verification, as in aiohttp.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._resolver, self._allowed, self._ssl = resolver, allowed, ssl

    async def fetch(self, url: str) -> bytes:
        """The content of a URL; raises `NotFetchedError`."""
        resolver = _CheckedResolver(self._resolver or ThreadedResolver(), self._allowed)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, ssl=self._ssl),
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # a compressed body could exceed the limit many times before it is counted
            trust_env=False,  # a proxy from the environment would connect to unchecked addresses
        )
        try:
            async with asyncio.timeout(TOTAL_SECONDS), session:
                return await self._follow(session, url)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise NotFetchedError from error

    async def _follow(self, session: aiohttp.ClientSession, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._check(url)
            async with session.get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, response.headers.get("Location", ""))
                    continue
                if response.status != 200:
                    raise NotFetchedError
                return await self._read(response)
        raise NotFetchedError

    def _check(self, url: str) -> None:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        name = host if parts.port in (None, 443) else f"{host}:{parts.port}"
        if parts.scheme != "https" or parts.username or name not in self._hosts or _is_address(host):
            raise NotFetchedError

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        data = bytearray()
        async for piece in response.content.iter_chunked(2**16):
            data += piece
            if len(data) > self._max_bytes:
                raise NotFetchedError
        return bytes(data)


class _CheckedResolver(AbstractResolver):
    """Returns only allowed addresses to aiohttp, which connects to these without resolving the name again."""

    def __init__(self, resolver: AbstractResolver, allowed: Callable[[str], bool]) -> None:
        self._resolver, self._allowed = resolver, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of a host name; raises `NotFetchedError` if any of them is not allowed."""
        addresses = await self._resolver.resolve(host, port, family)
        if not all(self._allowed(entry["host"]) for entry in addresses):
            raise NotFetchedError
        return addresses

    async def close(self) -> None:
        """There is nothing to close."""


def _is_address(host: str) -> bool:
    """Whether a host is an IP address in any notation that the system accepts, including 127.1 and 2130706433."""
    try:
        socket.inet_aton(host)
    except OSError:
        return ":" in host
    return True
