"""Metrics of ranking, and how sure they are."""
