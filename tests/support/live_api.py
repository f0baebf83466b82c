"""The API under uvicorn in a thread, without Ray Serve."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from longclip.checkpoint import load_checkpoint
from longclip.index import PublishedIndex, version_directory
from serving.api import create_api
from serving.embedder import Embedder
from serving.middleware import key_digest
from serving.model_source import open_model
from serving.operations import Operations
from serving.searcher import LocalSearcher
from tests.support.s3_server import free_ports

KEY = "a-key-for-tests-0123456789"


def tiny_operations(model: Path, index: Path | None = None) -> Operations:
    """The operations with a model and, if given, the first version of an index."""
    checkpoint = load_checkpoint(model)
    searcher = LocalSearcher(PublishedIndex.open(version_directory(index, 1))) if index else None
    return Operations(open_model(str(model), ""), checkpoint, Embedder(checkpoint, 1), searcher)


def scenes_api(model: Path, index: Path, key: str | None = KEY) -> FastAPI:
    """The API with a model and an index; None as `key` requires no key."""
    return create_api(tiny_operations(model, index), frozenset([key_digest(key)] if key else []))


@contextmanager
def running_api(api: FastAPI) -> Iterator[str]:
    """Run an API under uvicorn in a thread; yields its URL."""
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
