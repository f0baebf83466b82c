"""A local Ray with Serve."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve

from tests.support.local_ray import own_ray
from tests.support.places import ROOT


@contextmanager
def local_serve(**options: Any) -> Iterator[str]:
    """A Ray with Serve of its own, started with `options`, on a free port; yields its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with own_ray(
        num_cpus=6,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}},
    ):
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port}, **options)
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
