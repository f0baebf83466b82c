"""A corpus embedded into an index, and the index published for search."""
