"""Ranking metrics and their statistical significance."""
