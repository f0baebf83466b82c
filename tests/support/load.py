"""Clients that ask a server without a pause."""

import threading
from typing import Self

import httpx


class Load:
    """So many clients while the context lasts, each with one request at a time; what they ask is the subclass's."""

    def __init__(self, url: str, clients: int = 4) -> None:
        self.url, self.clients = url, clients
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def ask(self, client: httpx.Client, number: int) -> None:
        """One request of the client of this number, and what becomes of it."""
        raise NotImplementedError

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._stop.is_set():
                self.ask(client, number)
