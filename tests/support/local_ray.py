"""Local Ray instances: one that the files of a test run share, and others that a test starts for itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def start_ray(**options: Any) -> None:
    """Start a local Ray; once more if this busy machine takes longer than the 30 s that Ray waits for its node."""
    import ray  # here, because most tests need none of it

    for is_last in (False, True):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as error:
            if is_last or "timed out during startup" not in str(error):
                raise
            ray.shutdown()


@contextmanager
def own_ray(**options: Any) -> Iterator[None]:
    """A Ray for this test alone, started with `options`. The shared one is stopped first."""
    import ray

    ray.shutdown()
    start_ray(**options)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """A local Ray shared by all files that need a plain one; it is restarted only after a failure."""
    import ray

    if not ray.is_initialized():
        start_ray(num_cpus=4)
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
