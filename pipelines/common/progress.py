"""What jobs tell Prometheus, through the exporter that Ray runs on every node: how far they are, and how training goes.

A value is there as long as the process that told it, so an alert about a job ends with the job.
"""

from functools import cache
from typing import Any

from ray.train import UserCallback
from ray.util.metrics import Gauge

VALIDATION = "validation/"
TRAINING = {
    "step": "Steps done.",
    "total_steps": "Steps of the run.",
    "loss": "Loss that is minimised.",
    "retained_variance": "Share of the variance of image features that their primary components keep.",
    "gradient_norm": "Norm of the gradient, before it is clipped.",
    "learning_rate": "Learning rate.",
    "logit_scale": "Factor of the similarities.",
    "skipped_steps": "Steps whose gradient was not finite.",
    "pairs_per_second": "Pairs a second, of all workers.",
    "tokens_per_second": "Tokens a second, of all workers, without padding.",
    "data_wait_share": "Share of the time in which a worker waits for data.",
}
"""What a step reports, and what it is."""


@cache
def _gauge(name: str, description: str, *tags: str) -> Gauge:
    """Made when it is first set: a metric belongs to the Ray that its process is connected to."""
    return Gauge(f"longclip_{name}", description, tags)


def tell_pieces(verb: str, stage: str, done: int, of: int) -> None:
    """How far a stage of a job is: pieces done, and in all."""
    tags = {"job": verb, "stage": stage}
    _gauge("job_pieces_done", "Pieces of a stage that are done.", "job", "stage").set(done, tags)
    _gauge("job_pieces", "Pieces of a stage.", "job", "stage").set(of, tags)


def tell_rows(verb: str, stage: str, rows: int, rejected: int) -> None:
    """Rows of a stage that are done, and those of them that were rejected."""
    tags = {"job": verb, "stage": stage}
    _gauge("job_rows", "Rows of a stage that are done.", "job", "stage").set(rows, tags)
    _gauge("job_rows_rejected", "Rows of a stage that could not be used.", "job", "stage").set(rejected, tags)


class MetricsToPrometheus(UserCallback):
    """Tells what the workers of a run report, from the one process that controls the training."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Losses by part, recall by direction, and all of `TRAINING`, of rank 0: averages over all workers."""
        for name, value in metrics[0].items():
            if name.startswith(VALIDATION):
                gauge = _gauge("training_validation", "Recall on the validation set.", "run", "metric")
                gauge.set(value, {"run": self.run, "metric": name.removeprefix(VALIDATION)})
            elif name.endswith("_loss"):
                _gauge("training_loss_part", "Parts of the loss.", "run", "part").set(
                    value, {"run": self.run, "part": name}
                )
            elif name in TRAINING:
                _gauge(f"training_{name}", TRAINING[name], "run").set(value, {"run": self.run})
