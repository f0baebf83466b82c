"""Processes of a job, by the same settings in every entry."""

from typing import Any

from pydantic import PositiveInt

from pipelines.common.settings import Settings


class Workers(Settings):
    """Processes that hold the model."""

    count: PositiveInt = 1
    """Number of processes."""
    use_gpu: bool = False
    """Give each process one GPU."""
    cpus: PositiveInt = 1
    """Logical CPUs of each process."""

    @property
    def resources(self) -> dict[str, Any]:
        """What an actor of Ray asks for."""
        return {"num_cpus": self.cpus, "num_gpus": 1 if self.use_gpu else 0}

    @property
    def total_cpus(self) -> int:
        """Logical CPUs of all processes."""
        return self.count * self.cpus
