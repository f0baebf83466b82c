"""Local Ray instances: one that the files of a test run share, and others that a test starts for itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """A Ray for this test alone, started with `options`. The shared one is stopped first."""
    import ray  # here, because most tests need none of it

    ray.shutdown()
    ray.init(address="local", include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A local Ray shared by all files that need a plain one; it is restarted only after a failure."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=4, include_dashboard=False)
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed > failed:
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _ray_ends_with_the_tests() -> Iterator[None]:
    yield
    import sys

    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
