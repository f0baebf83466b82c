"""Progress that other processes of a job report reaches the listener in its driver."""

import pytest
import ray

from pipelines.common.events import listen, report, warn

pytestmark = pytest.mark.usefixtures("ray_cluster")


def remote_steps() -> None:
    report("step 1/2")
    warn("the tracking server does not answer")


def test_a_listener_gets_the_lines_of_all_processes_of_the_job() -> None:
    lines: list[str] = []
    task = ray.remote(num_cpus=1)(remote_steps)
    with listen(lines.append):
        report("started")
        ray.get(task.remote())
        ray.get(task.remote())
    remote = ["step 1/2", "warning: the tracking server does not answer"]
    assert lines[0] == "started"
    assert sorted(lines[1:]) == sorted(2 * remote)
    ray.get(task.remote())  # nobody listens: nothing is kept, nothing fails
    with listen(lines.append):
        pass
    assert len(lines) == 5
