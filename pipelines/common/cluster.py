"""The Ray cluster that a job runs on."""

import logging
import os
import sys

import ray

TRACE_LOGGERS = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")
"""They print the stack of every failed task. Errors that a user can fix are printed as one line by `run_entry`, all
others with their stack by Python."""


def connect(min_cpus: int) -> None:
    """Join the cluster of `RAY_ADDRESS` (set inside submitted jobs), or start Ray on this machine.

    A local Ray gets at least `min_cpus` logical CPUs, even if the machine has fewer: training workers reserve theirs,
    and a data pipeline without any would wait forever.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, logging_level="warning")
        else:
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, min_cpus), logging_level="warning")
    data_context()


def data_context() -> ray.data.DataContext:
    """Options of all datasets in this process."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in TRACE_LOGGERS:
        logging.getLogger(name).addFilter(_only_in_the_log_file)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    # A block is passed on when it is full: small ones deliver the first batch early and limit the memory.
    context.target_max_block_size = 16 * 1024 * 1024
    # Ray Data's wrapper loses the error that it wraps between processes.
    context.raise_original_map_exception = True
    return context


def _only_in_the_log_file(record: logging.LogRecord) -> bool:
    record.hide = record.levelno >= logging.ERROR  # Ray Data's handler for the console skips such records
    return True
