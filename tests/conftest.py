"""Shared fixtures: a tiny CLIP with the real vocabulary, and where the reference material lies."""

import gc
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig

from longclip.checkpoint import Checkpoint, new_model, save_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

pytest_plugins = ("tests.support.exported_models", "tests.support.s3_server", "tests.support.text_models")

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

TINY_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_config(context_length: int = 248) -> CLIPConfig:
    """A CLIP of some thousand weights beside its real vocabulary, 32-pixel images."""
    return CLIPConfig(
        text_config={
            **TINY_TOWER,
            "max_position_embeddings": context_length,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
            "pad_token_id": 0,
        },
        vision_config={**TINY_TOWER, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )


def picture(seed: int = 0, size: tuple[int, int] = (40, 36), image_format: str = "PNG") -> bytes:
    """An encoded image of random pixels, of width x height `size`."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs tests that are coroutines, marked `anyio`."""
    return "asyncio"


def program(name: str) -> str | None:
    """Path of a system program; those of PostgreSQL are not where programs are looked for."""
    folders = [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join(folders))


def needs_programs(*names: str, packages: str = "chromium, chromium-driver") -> pytest.MarkDecorator:
    """Skip tests where system programs are absent; continuous integration, which installs them, fails instead."""
    missing = ", ".join(name for name in names if program(name) is None)
    if missing and os.environ.get("LONGCLIP_REQUIRE_SYSTEM_PACKAGES"):
        pytest.exit(f"{missing} must be installed here", returncode=1)
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed (Debian packages {packages})")


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """A module that leaves its Ray running fails itself, not the next one that starts its own.

    Nor does one leave file systems of S3: one that is collected while a later test runs an event loop closes its
    connections in that loop, which is not theirs, and that test fails.
    """
    yield
    if "s3fs" in sys.modules:
        gc.collect()
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized(), "use the fixture ray_cluster"


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests of a module."""
    import ray  # here, because most tests need none of it

    ray.init(address="local", num_cpus=4, include_dashboard=False)
    yield
    ray.shutdown()


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
        pytest.skip("reference vectors not found beside the repository (../shared/vectors)")
    return SHARED / "vectors"
