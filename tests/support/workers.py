"""Fresh processes that train together."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch import multiprocessing as torch_multiprocessing


def run_workers(function: Callable[..., None], *arguments: Any, count: int) -> None:
    """Run `function(rank, *arguments)` in `count` fresh processes, which share one import of the heavy libraries."""
    multiprocessing.set_forkserver_preload(["tests.support.training_steps", "transformers.models.clip.modeling_clip"])
    torch_multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")
