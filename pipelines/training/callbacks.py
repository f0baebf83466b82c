"""What the controller of a training does with the workers' reports: MLflow, Prometheus and lines of progress."""

import time
from typing import Any

from ray.train import UserCallback

from pipelines.common.events import report, warn
from pipelines.common.progress import gauge
from pipelines.registry.runs import MetricLog

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
"""Reported metrics and their description."""


class MetricsToMlflow(UserCallback):
    """Logs the reported metrics to MLflow and prints progress.

    Training continues while MLflow does not answer. A warning on stderr says so once, and the metrics are sent when it
    answers again. After the last step this waits up to `LAST_SECONDS` for it, then a warning says what was lost.
    """

    LAST_SECONDS, PAUSE_SECONDS = 300.0, 5.0

    def __init__(self, uri: str, run_id: str) -> None:
        self.metrics = MetricLog(uri, run_id)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Log the metrics of rank 0, which are averages over all workers."""
        reported = dict(metrics[0])
        step, total = int(reported.pop("step")), int(reported.pop("total_steps"))
        loss, speed = reported["loss"], reported["pairs_per_second"]
        parts = ", ".join(f"{name} {value:.3f}" for name, value in reported.items() if name.endswith("_loss"))
        left = (total - step) * reported["batch_seconds"]
        report(f"step {step}/{total}: loss {loss:.3f} ({parts}), {speed:.0f} pairs/s, {left:.0f} s left")
        self.metrics.add(reported, step)
        self.metrics.send()
        deadline = time.monotonic() + self.LAST_SECONDS
        while step == total and self.metrics and time.monotonic() < deadline:
            time.sleep(self.PAUSE_SECONDS)
            self.metrics.send()
        if step == total and self.metrics:
            warn(f"MLflow did not take {len(self.metrics)} metrics of run {self.metrics.run_id}, and they are lost")


class MetricsToPrometheus(UserCallback):
    """Exports the reported metrics to Prometheus, by the exporter that Ray runs on every node."""

    def __init__(self, run: str) -> None:
        self.run = run

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Export the losses by part, recall by direction and all of `TRAINING` of rank 0: averages over all workers."""
        for name, value in metrics[0].items():
            if name.startswith(VALIDATION):
                recall = gauge("training_validation", "Recall on the validation set.", "run", "metric")
                recall.set(value, {"run": self.run, "metric": name.removeprefix(VALIDATION)})
            elif name.endswith("_loss"):
                loss = gauge("training_loss_part", "Parts of the loss.", "run", "part")
                loss.set(value, {"run": self.run, "part": name})
            elif name in TRAINING:
                gauge(f"training_{name}", TRAINING[name], "run").set(value, {"run": self.run})
