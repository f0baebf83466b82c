"""Layouts of annotation files: each is a generator of entries (id, image, captions). And the table of all layouts."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

from upath import UPath

from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.csv_reading import csv_rows
from pipelines.data.sources.entries import Entry, Layout, object_entry
from pipelines.data.sources.folder_layouts import class_folders, dci, folder, imagefolder, images_below, urban1k
from pipelines.data.sources.json_reading import MAX_CHARACTERS, json_items, json_lines
from pipelines.data.sources.settings import SourceSettings
from pipelines.data.sources.text_decoding import open_text, undecoded


def sharegpt4v(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """A JSON list of `{id, image, conversations: [{from, value}, ...]}`: the caption is the model's first reply."""
    with open_text(path, settings.encoding) as text:
        for number, item, problem in json_items(text, settings.encoding):
            entry = object_entry(number, item, settings, problem)
            # Ids of ShareGPT4V repeat between its sources; the path of the image is unique.
            yield replace(entry, id=entry.image) if settings.id is None and entry.image else entry


def jsonl(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """One JSON object per line, such as DOCCI's `{example_id, image_file, description}`, or with conversations."""
    with open_text(path, settings.encoding) as text:
        for number, item, problem in json_lines(text, settings.encoding):
            yield object_entry(number, item, settings, problem)


def csv(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Rows of a CSV or TSV file with a header, such as open_clip's `filepath<TAB>title`."""
    with open_text(path, settings.encoding) as text:
        for number, item, problem in csv_rows(text, settings.encoding):
            yield object_entry(number, item, settings, problem)


def iiw(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """IIW's `{image/key, image/url, IIW}` per line; the image is the file named by the key, or else the URL."""
    files = {PurePosixPath(name).stem: name for name in images_below(images)}
    with open_text(path, settings.encoding) as text:
        for number, item, problem in json_lines(text, settings.encoding):
            entry = object_entry(number, item, settings, problem)
            if entry.image is None:
                yield entry
                continue
            key = str(item.get("image/key") or entry.image)
            name = files.get(PurePosixPath(key).stem) or item.get("image/url") or entry.image
            yield replace(entry, id=key if settings.id is None else entry.id, image=name)


def coco(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """COCO captions (`images`, `annotations`), or Karpathy's splits (`images` with `sentences`)."""
    captions: dict[str, list[Any]] = {}
    with open_text(path, settings.encoding) as text:
        for number, item, problem in json_items(text, settings.encoding, "annotations"):
            if problem or not isinstance(item, dict) or item.get("image_id") is None:
                yield Entry(f"annotation {number}", problem=problem or "annotation has no image_id")
            else:
                captions.setdefault(str(item["image_id"]), []).append(item.get("caption"))
    with open_text(path, settings.encoding) as text:
        for number, item, problem in json_items(text, settings.encoding, "images"):
            if not isinstance(item, dict):
                yield Entry(f"{number:08d}", problem=f"entry is not a JSON object but {type(item).__name__}")
                continue
            texts, missing = caption_texts(captions.pop(str(item.get("id")), None) or item.get("sentences"))
            name = item.get("file_name") or item.get("filename")
            folder_name = item.get("filepath")
            image = f"{folder_name}/{name}" if folder_name and name else name
            key = item.get("id", item.get("cocoid", item.get("imgid", name)))
            missing = missing if isinstance(name, str) else "entry has no image"
            image = image if isinstance(name, str) else None
            yield Entry(str(number if key is None else key), image, texts, problem or missing, item.get("split"))
    for key, values in captions.items():
        yield Entry(key, problem=f"{len(values)} captions of an image that is not in `images`")


def flickr30k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Lines of `file#number<TAB>caption`; the lines of an image are consecutive."""

    def lines() -> Iterator[tuple[str, str, str | None]]:
        with open_text(path, settings.encoding) as text:
            for number, line in enumerate(iter(lambda: text.readline(MAX_CHARACTERS), ""), 1):
                name, separator, caption = line.rstrip("\r\n").partition("\t")
                reason = undecoded(line, settings.encoding)
                if not line.strip():
                    continue
                if separator:
                    yield name.rpartition("#")[0] or name, caption, f"line {number} {reason}" if reason else None
                else:
                    yield f"line {number}", "", "line has no tab between image and caption"

    for name, group in groupby(lines(), key=lambda line: line[0]):
        rows = list(group)
        problem = next((problem for _, _, problem in rows if problem), None)
        key = name if problem else PurePosixPath(name).stem
        yield Entry(key, None if problem else name, [caption for _, caption, _ in rows], problem)


LAYOUTS: dict[str, Layout] = {
    "sharegpt4v": sharegpt4v,
    "docci": jsonl,
    "iiw": iiw,
    "jsonl": jsonl,
    "csv": csv,
    "dci": dci,
    "coco": coco,
    "flickr30k": flickr30k,
    "urban1k": urban1k,
    "folder": folder,
    "imagefolder": imagefolder,
    "class_folders": class_folders,
}
"""Layouts with one file per image."""
