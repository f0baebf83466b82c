"""Suffixes of the files in sources, in lower case; files are matched in any case."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".jpe", ".avif"),
    *(".jp2", ".ppm", ".pgm", ".heic", ".heif", ".jxl"),
)
"""Some of the last cannot be decoded everywhere: their rows are rejected as images, not as texts without one."""

TEXT_SUFFIXES = (".txt", ".caption")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
ANNOTATION_SUFFIXES = (".json", ".token", ".token.txt", *JSON_LINES_SUFFIXES)
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
"""Annotations of Hugging Face's imagefolder."""
