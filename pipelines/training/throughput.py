"""How fast training goes, and how long it waits for data."""

import time
from collections.abc import Iterator

from longclip.training.step import ImageTextBatch


class Throughput:
    """Pairs, tokens and waiting time of one worker since its last report."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting from zero."""
        self.pairs, self.tokens, self.waited, self.since = 0, 0, 0.0, time.monotonic()

    def timed(self, batches: Iterator[ImageTextBatch]) -> Iterator[ImageTextBatch]:
        """The batches; the time spent waiting for each one is counted."""
        while True:
            before = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - before
            if batch is None:
                return
            yield batch

    def count(self, batch: ImageTextBatch) -> None:
        """Add a batch that was trained on."""
        self.pairs += len(batch)
        self.tokens += sum(int(tokens.lengths.sum()) for tokens in (batch.caption, batch.summary) if tokens is not None)

    def metrics(self, workers: int, batch_size: int) -> dict[str, float]:
        """Pairs and tokens per second of all workers, at this one's speed, and the share of time spent waiting."""
        seconds = time.monotonic() - self.since
        return {
            "batch_seconds": seconds * batch_size / max(1, self.pairs),
            "pairs_per_second": self.pairs * workers / seconds,
            "tokens_per_second": self.tokens * workers / seconds,
            "data_wait_share": self.waited / seconds,
        }
