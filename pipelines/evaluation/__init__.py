"""Retrieval and zero-shot protocols, measured and reported."""
