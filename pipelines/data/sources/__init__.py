"""Readers of image-caption data sets in all supported layouts."""
