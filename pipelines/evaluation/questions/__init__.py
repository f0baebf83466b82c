"""Evaluation sets that ask questions instead of ranking all texts: their layouts, and how answers are scored."""
