"""Short summaries of long captions: one module for each kind of strategy, and the job that adds them to a Parquet."""
