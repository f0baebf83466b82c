"""Preparation of training data: reading, cleaning and deduplicating data sets, and summarizing captions."""
