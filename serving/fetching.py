"""Images by their address, from hosts that the operator named. Nothing is fetched unless there are some.

A server that opens addresses for strangers opens those of its own network, too. So the host must be on the list, by
https; its name is looked up once and must not stand for an address that is not public; the connection goes to the
address that was checked, whatever the name stands for a moment later; and each redirect is checked like the first
address. What comes is bounded in bytes and in time. The refusal is the same for every reason: it tells nothing of what
the network holds.
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
"""Prefixes under which IPv4 addresses, private ones too, are reached by IPv6 (RFC 6052, RFC 8215)."""
MAX_REDIRECTS = 2
CONNECT_SECONDS = 3.0
TOTAL_SECONDS = 10.0


class NotFetchedError(Exception):
    """An address is not allowed, or does not give an image in time and size."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet; those inside an IPv6 address count as themselves."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast


class ImageFetcher:
    """Fetches from a list of hosts."""

    def __init__(
        self,
        hosts: Collection[str],
        max_bytes: int,
        *,
        resolver: AbstractResolver | None = None,
        allowed: Callable[[str], bool] = is_public,
        ssl: bool | aiohttp.Fingerprint = True,
    ) -> None:
        """A fetcher; no connection is made yet.

        Args:
            hosts: names that may be fetched from, as they stand in an address, with the port where it is not 443.
            max_bytes: most bytes of an image.
            resolver: looks names up; the system's where None.
            allowed: which IP addresses may be connected to.
            ssl: how certificates are checked, as aiohttp takes it.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._resolver, self._allowed, self._ssl = resolver, allowed, ssl

    async def fetch(self, url: str) -> bytes:
        """The bytes behind an address; raises `NotFetchedError`."""
        resolver = _CheckedResolver(self._resolver or ThreadedResolver(), self._allowed)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, ssl=self._ssl),
            timeout=aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,  # a body that unpacks itself would pass the limit by far before it is counted
            trust_env=False,  # a proxy of the environment would make the connection, unchecked
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
    """Gives aiohttp only addresses that may be connected to; it connects to these and does not look up again."""

    def __init__(self, resolver: AbstractResolver, allowed: Callable[[str], bool]) -> None:
        self._resolver, self._allowed = resolver, allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """All addresses of a name; raises `NotFetchedError` where one of them is not allowed."""
        found = await self._resolver.resolve(host, port, family)
        if not all(self._allowed(entry["host"]) for entry in found):
            raise NotFetchedError
        return found

    async def close(self) -> None:
        """Nothing is held."""


def _is_address(host: str) -> bool:
    """Whether a host is an IP address in any spelling that a system would take for one: 127.1 and 2130706433, too."""
    try:
        socket.inet_aton(host)
    except OSError:
        return ":" in host
    return True
