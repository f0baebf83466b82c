"""Layouts of CLIP weights in other software: names, shapes and side files, read and written."""
