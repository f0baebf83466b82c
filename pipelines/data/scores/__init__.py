"""CLIP scores of image-text pairs, and the choice of rows by them."""
