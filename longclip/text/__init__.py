"""Captions: sentences, summaries without a model, checks, perturbations."""
