"""An index of scenes, and the API over it, shared by the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from longclip.checkpoint import Checkpoint
from tests.support.live_api import running_api, scenes_api
from tests.support.scenes_index import write_index


@pytest.fixture(scope="session")
def index(tiny_checkpoint: Checkpoint, tiny_checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of scenes, built with the tiny checkpoint."""
    return write_index(tmp_path_factory.mktemp("scenes") / "index", tiny_checkpoint, tiny_checkpoint_dir)


@pytest.fixture(scope="session")
def client(index: Path, tiny_checkpoint_dir: Path) -> Iterator[httpx.Client]:
    """An HTTP client of the API with the index and without API keys."""
    api = scenes_api(tiny_checkpoint_dir, index, key=None)
    with running_api(api) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
