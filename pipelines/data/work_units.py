"""Units of work: each is done by one task, committed atomically, and skipped by a rerun once finished."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import ray
from ray.data import ActorPoolStrategy
from upath import UPath

from pipelines.common.progress import Progress
from pipelines.common.storage import explained
from pipelines.common.whole_files import write_whole
from pipelines.common.workers import Workers
from pipelines.data.workspace import Workspace

MAX_BLOCKS = 4000
"""Maximum number of Ray tasks; with more units, a task does several."""


class UnitTask(Protocol):
    """The work on a unit. It writes files atomically, with names that depend only on the number of the unit."""

    def __call__(self, number: int, unit: dict[str, Any]) -> dict[str, Any]:
        """Do a unit; returns JSON values, among them `rows_in`, `rows_out` and `rejected` (numbers of rows)."""


def run_units(
    work: Workspace,
    stage: str,
    units: Sequence[dict[str, Any]],
    task: UnitTask,
    progress: Progress,
    workers: Workers | None = None,
    units_at_once: int = 1,
    on_result: Callable[[dict[str, Any]], None] = lambda result: None,
) -> list[dict[str, Any]]:
    """Do the unfinished units of a stage; returns the results of all units in their order.

    A unit is finished when its result file exists. That file is written last: a unit whose worker was killed is
    repeated, and overwrites the files of the first attempt. A result with a true `stopped` is not written: the next run
    does that unit again.

    Args:
        work: workspace of the output.
        stage: name of the stage, and of its folder in the workspace.
        units: JSON values that are the same in every run.
        task: sent to the workers by pickle.
        progress: reports finished units.
        workers: processes that keep the task, with any model it loaded; None for Ray tasks on any free CPU.
        units_at_once: units that a process of `workers` does at the same time, in threads.
        on_result: called with every result, including those of an earlier run; may raise to stop the job.
    """
    folder = work.folder(stage)
    results = finished_results(folder)
    if results:
        print(f"{progress.verb}: {len(results)} of {len(units)} pieces of '{stage}' are already finished", flush=True)
    rows = rejected = 0
    for result in results.values():
        on_result(result)
        rows, rejected = rows + result["rows_in"], rejected + result["rejected"]
    pending = [{"number": number, "unit": json.dumps(units[number])} for number in range(len(units))]
    pending = [unit for unit in pending if unit["number"] not in results]
    if pending:
        dataset = ray.data.from_items(pending, override_num_blocks=min(len(pending), MAX_BLOCKS))
        if workers:
            finished = dataset.map_batches(
                RunUnits,
                fn_constructor_args=[task, folder],
                compute=ActorPoolStrategy(
                    size=workers.count,
                    max_concurrent_calls_per_actor=units_at_once,
                    enable_true_multi_threading=units_at_once > 1,
                ),
                **workers.resources,
                batch_size=1,
            )
        else:
            finished = dataset.map_batches(RunUnits(task, folder), batch_size=1)
        for row in finished.iter_rows():
            result = results[int(row["number"])] = json.loads(row["result"])
            on_result(result)
            work.lease.check()
            rows, rejected = rows + result["rows_in"], rejected + result["rejected"]
            progress.show(stage, len(results), len(units), rows, rejected)
    return [results[number] for number in range(len(units))]


def finished_results(folder: UPath) -> dict[int, dict[str, Any]]:
    """Results of the finished units, by number."""
    base = folder.path.rstrip("/")
    try:
        names = [name for name in folder.fs.ls(base, detail=False) if name.endswith(".json")]
    except FileNotFoundError:
        return {}
    texts = folder.fs.cat_ranges(names, 0, None, on_error="raise")  # concurrent; `cat` would expand glob patterns
    numbers = (int(name.rpartition("/")[2].removesuffix(".json")) for name in names)
    return {number: json.loads(text) for number, text in zip(numbers, texts, strict=True)}


class RunUnits:
    """Does units and commits their results, in a Ray task or actor."""

    def __init__(self, task: UnitTask, folder: UPath) -> None:
        self.task, self.folder = task, folder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Results of a batch of units."""
        texts = []
        for number, unit in zip(batch["number"], batch["unit"], strict=True):
            with explained("output", self.folder):
                result = self.task(int(number), json.loads(unit))
                texts.append(json.dumps(result))
                if not result.get("stopped"):
                    write_whole(self.folder / f"{int(number):06d}.json", texts[-1].encode())
        return {"number": batch["number"], "result": np.array(texts, dtype=object)}
