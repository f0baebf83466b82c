"""Several entries in a row: the demo and the study."""
