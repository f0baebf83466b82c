"""Layouts of folders: images with texts or metadata next to them."""

import json
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath

from upath import UPath

from longclip.errors import DataError, one_line
from pipelines.common.file_listing import HIDDEN_MEDIA, list_files
from pipelines.data.sources.captions import caption_texts, side_captions
from pipelines.data.sources.csv_reading import csv_rows
from pipelines.data.sources.entries import Entry, object_entry
from pipelines.data.sources.json_reading import json_lines
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.suffixes import IMAGE_SUFFIXES, METADATA_NAMES, TEXT_SUFFIXES
from pipelines.data.sources.text_decoding import decode_text, open_text

BATCH_ENTRIES = 512
MAX_TEXT_BYTES = 16 * 1024 * 1024
SIDE_SUFFIXES = (*TEXT_SUFFIXES, ".json")


def images_below(root: UPath) -> list[str]:
    """Paths of all images below a directory, relative to it, sorted."""
    return list_files(root, HIDDEN_MEDIA).having(IMAGE_SUFFIXES)


def folder(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Images with `.txt` or `.json` files next to them, also in subfolders, as in img2dataset's `files` layout."""
    yield from _pairs(images, path, settings)


def urban1k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """`image/{n}.jpg` and `caption/{n}.txt`, joined by their stem."""
    yield from _pairs(images, path / "caption", settings)


def class_folders(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """One folder per class; its name is the caption."""
    for name in images_below(path):
        label, separator, _ = name.partition("/")
        yield Entry(name, name, [label]) if separator else Entry(name, problem="image is not in the folder of a class")


def dci(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """`annotations/*.json` of `{image, short_caption, extra_caption}`: DCI's full caption joins both with a newline."""
    root = path / "annotations"
    names = list_files(root, HIDDEN_MEDIA).having((".json",))
    for name, content in _contents(root, names):
        key = PurePosixPath(name).stem
        try:
            if isinstance(content, str):
                raise DataError(content)
            item = json.loads(decode_text(content, settings.encoding))
            parts = [item["short_caption"], item["extra_caption"]]
            texts, problem = caption_texts([part for part in parts if part is not None] or None)
            yield Entry(key, item["image"], ["\n".join(texts)], problem)
        except (DataError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            yield Entry(key, problem=f"'{key}.json' is not a DCI annotation: {type(error).__name__}: {error}")


def imagefolder(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Hugging Face's imagefolder: `metadata.jsonl` or `metadata.csv`, whose `file_name` is relative to its folder."""
    listing = list_files(path, HIDDEN_MEDIA)
    unlisted = set(images_below(images))
    for name in listing.names:
        base, _, file = name.rpartition("/")
        if file.lower() not in METADATA_NAMES:
            continue
        with open_text(path / name, settings.encoding) as text:
            read = json_lines if file.lower().endswith(".jsonl") else csv_rows
            for number, item, problem in read(text, settings.encoding):
                entry = object_entry(number, item, settings, problem)
                if entry.image is None:
                    yield replace(entry, id=f"{name}:{number}")
                    continue
                image = entry.image
                if "://" not in image:
                    image = posixpath.normpath(posixpath.join(base, image))
                unlisted.discard(image)
                yield replace(entry, id=image if settings.id is None else entry.id, image=image)
    for image in sorted(unlisted):
        yield Entry(image, image, problem="image is not listed in a metadata file")


def _pairs(images: UPath, texts: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Images and the texts with the same path but for the suffix."""
    names = images_below(images)
    side_files: dict[str, dict[str, str]] = {}
    for name in list_files(texts, HIDDEN_MEDIA).having(SIDE_SUFFIXES):
        stem, _, suffix = name.rpartition(".")
        side_files.setdefault(stem, {})[f".{suffix.lower()}"] = name
    for start in range(0, len(names), BATCH_ENTRIES):
        chunk = names[start : start + BATCH_ENTRIES]
        wanted = {name for image in chunk for name in side_files.get(_stem(image), {}).values()}
        contents = dict(_contents(texts, sorted(wanted)))
        for name in chunk:
            files = side_files.get(_stem(name), {})
            yield _pair(name, {suffix: contents[file] for suffix, file in files.items()}, settings)
    for stem in sorted(side_files.keys() - {_stem(name) for name in names}):
        # A .json file alone describes no image: img2dataset writes them for whole folders, too.
        text = next((side_files[stem][suffix] for suffix in TEXT_SUFFIXES if suffix in side_files[stem]), None)
        if text is not None:
            yield Entry(stem, problem=f"'{text}' has no image")


def _pair(name: str, contents: dict[str, bytes | str], settings: SourceSettings) -> Entry:
    if not contents:
        return Entry(_stem(name), name, problem="image has no .txt file with its caption")
    text = next((contents[suffix] for suffix in TEXT_SUFFIXES if suffix in contents), None)
    metadata = contents.get(".json")
    if isinstance(text, str):
        return Entry(_stem(name), name, problem=text)
    captions, problem = side_captions(text, metadata if isinstance(metadata, bytes) else None, settings)
    return Entry(_stem(name), name, captions, problem)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _contents(root: UPath, names: list[str]) -> Iterator[tuple[str, bytes | str]]:
    """Each file's content, or the reason why it cannot be used."""
    base = root.path.rstrip("/")
    for start in range(0, len(names), BATCH_ENTRIES):
        chunk = names[start : start + BATCH_ENTRIES]
        files = root.fs.cat_ranges([f"{base}/{name}" for name in chunk], 0, MAX_TEXT_BYTES + 1, on_error="return")
        for name, content in zip(chunk, files, strict=True):
            if isinstance(content, FileNotFoundError | PermissionError):
                yield name, f"'{name}' does not exist or is not readable"
            elif isinstance(content, OSError) and content.errno is not None:
                yield name, f"'{name}' cannot be read: {one_line(content.strerror)}"
            elif isinstance(content, Exception):
                raise content
            elif len(content) > MAX_TEXT_BYTES:
                yield name, f"'{name}' has more than {MAX_TEXT_BYTES} bytes"
            else:
                yield name, content
