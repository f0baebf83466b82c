"""Shared fixtures: a tiny CLIP with the real vocabulary, and where the reference material lies."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from longclip.checkpoint import Checkpoint, new_model, save_checkpoint
from tests.support.places import SHARED
from tests.support.tiny_clip import tiny_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores

pytest_plugins = (
    "tests.support.chat_server",
    "tests.support.caption_server",
    "tests.support.exported_models",
    "tests.support.fake_vllm",
    "tests.support.local_ray",
    "tests.support.s3_server",
    "tests.support.text_models",
    "tests.support.variants",
    "tests.support.vision_models",
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs tests that are coroutines, marked `anyio`."""
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def s3_file_systems_end_with_their_module() -> Iterator[None]:
    """S3 file systems are collected with the module that made them.

    One that is collected later, while a test runs an event loop, closes its connections in that loop, and the test
    fails.
    """
    yield
    if "s3fs" in sys.modules:
        gc.collect()


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """An untrained tiny Long-CLIP."""
    torch.manual_seed(0)
    checkpoint = new_model(tiny_config())
    checkpoint.model.eval()
    return checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint_dir(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a directory."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint(tiny_checkpoint, directory, {"origin": "test"})
    return directory


@pytest.fixture(scope="session")
def vectors() -> Path:
    """The folder of reference vectors; skips where it is absent."""
    if not (SHARED / "vectors").is_dir():
        pytest.skip("reference vectors not found next to the repository (../shared/vectors)")
    return SHARED / "vectors"
