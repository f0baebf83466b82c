"""Layouts of annotation files and folders: each is a generator of entries (id, image, captions)."""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import ijson
from upath import UPath

from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.tar import IMAGE_SUFFIXES

BATCH_ENTRIES = 512
MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """An image and its captions, as an annotation file lists them."""

    id: str
    image: str | None = None
    """Path relative to the root of the images, or URI."""
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    split: str | None = None
    """Split of the entry, in layouts that have one."""


Layout = Callable[[UPath, UPath, SourceSettings], Iterator[Entry]]
"""(path of the annotations, root of the images, settings) -> entries."""


def object_entry(number: int, item: Any, settings: SourceSettings) -> Entry:
    """Entry of a JSON object, by the field names in the settings or well-known ones.

    Args:
        number: position in the file; the id, if the object has none.
        item: the object.
        settings: names of its fields.
    """
    if not isinstance(item, dict):
        return Entry(f"{number:08d}", problem=f"entry is not a JSON object but {type(item).__name__}")
    id_name = first_known(settings.id, ID_NAMES, item)
    key = str(item[id_name]) if id_name and item[id_name] not in (None, "") else f"{number:08d}"
    image_name = first_known(settings.image, IMAGE_NAMES, item)
    caption_name = first_known(settings.caption, CAPTION_NAMES, item)
    image = item[image_name] if image_name else None
    if not isinstance(image, str) or not image:
        return Entry(key, problem="entry has no image")
    if caption_name is None:
        return Entry(key, image, problem="entry has no caption")
    captions, problem = caption_texts(item[caption_name])
    return Entry(key, image, captions, problem, item.get("split"))


def sharegpt4v(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """A JSON list of `{id, image, conversations: [{from, value}, ...]}`: the caption is the model's first reply."""
    with path.open("rb") as file:
        for number, item in enumerate(ijson.items(file, "item", use_float=True)):
            entry = object_entry(number, item, settings)
            # Ids of ShareGPT4V repeat between its sources; the path of the image is unique.
            yield replace(entry, id=entry.image) if settings.id is None and entry.image else entry


def jsonl(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """One JSON object per line, such as DOCCI's `{example_id, image_file, description}`."""
    for number, item in _json_lines(path):
        yield item if isinstance(item, Entry) else object_entry(number, item, settings)


def iiw(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """IIW's `{image/key, image/url, IIW}` per line; the image is the file named by the key, or else the URL."""
    files = {PurePosixPath(name).stem: name for name in _images_below(images)}
    for number, item in _json_lines(path):
        if isinstance(item, Entry):
            yield item
            continue
        entry = object_entry(number, item, settings)
        if entry.image is None:
            yield entry
            continue
        key = str(item.get("image/key") or entry.image)
        name = files.get(PurePosixPath(key).stem) or item.get("image/url") or entry.image
        yield replace(entry, id=key if settings.id is None else entry.id, image=name)


def _json_lines(path: UPath) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number in range(1 << 62):
            line = file.readline(MAX_LINE_BYTES)
            if not line:
                return
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                yield number, Entry(f"{number:08d}", problem=f"line {number + 1} is not valid JSON: {error}")


def coco(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """COCO captions (`images`, `annotations`), or Karpathy's splits (`images` with `sentences`)."""
    captions: dict[Any, list[Any]] = {}
    with path.open("rb") as file:
        for item in ijson.items(file, "annotations.item", use_float=True):
            if isinstance(item, dict):
                captions.setdefault(item.get("image_id"), []).append(item.get("caption"))
    with path.open("rb") as file:
        for number, item in enumerate(ijson.items(file, "images.item", use_float=True)):
            if not isinstance(item, dict):
                yield Entry(f"{number:08d}", problem=f"entry is not a JSON object but {type(item).__name__}")
                continue
            sentences = [sentence.get("raw") for sentence in item.get("sentences", []) if isinstance(sentence, dict)]
            texts, problem = caption_texts(captions.pop(item.get("id"), None) or sentences or None)
            name = item.get("file_name") or item.get("filename")
            folder = item.get("filepath")
            image = f"{folder}/{name}" if folder and name else name
            key = item.get("id", item.get("cocoid", item.get("imgid", name)))
            problem = problem if isinstance(name, str) else "entry has no image"
            yield Entry(str(number if key is None else key), image, texts, problem, item.get("split"))
    for key, texts in captions.items():
        yield Entry(str(key), problem=f"{len(texts)} captions of an image that is not in `images`")


def flickr30k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Lines of `file#number<TAB>caption`; the lines of an image are consecutive."""

    def lines() -> Iterator[tuple[str, str | None]]:
        with path.open("rb") as file:
            for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8", errors="replace")):
                name, separator, caption = line.rstrip("\n").partition("\t")
                if line.strip():
                    yield (name.rpartition("#")[0] or name, caption) if separator else (f"line {number + 1}", None)

    for name, group in groupby(lines(), key=lambda line: line[0]):
        captions = [caption for _, caption in group if caption is not None]
        problem = None if captions else "line has no tab between image and caption"
        yield Entry(PurePosixPath(name).stem if captions else name, name if captions else None, captions, problem)


def dci(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """`annotations/*.json` of `{image, short_caption, extra_caption}`: DCI's full caption joins both with a newline."""
    base = path.path.rstrip("/")
    for name in sorted(path.fs.find(f"{base}/annotations")):
        if not name.endswith(".json"):
            continue
        key = PurePosixPath(name).stem
        try:
            item = json.loads(path.fs.cat_file(name))
            caption = f"{item['short_caption']}\n{item['extra_caption']}"
            yield Entry(key, item["image"], [caption])
        except (ValueError, KeyError, TypeError) as error:
            yield Entry(key, problem=f"'{key}.json' is not a DCI annotation: {type(error).__name__}: {error}")


def class_folders(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """One folder per class; its name is the caption."""
    for name in sorted(_images_below(path)):
        label, separator, _ = name.partition("/")
        yield Entry(name, name, [label]) if separator else Entry(name, problem="image is not in the folder of a class")


def urban1k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """`image/{n}.jpg` and `caption/{n}.txt`, joined by their stem."""
    yield from _pairs(dict(_stems(images)), path / "caption")


def folder(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Images with `.txt` files next to them, also in subfolders, as in img2dataset's `files` layout."""
    yield from _pairs(dict(_stems(images)), path)


def _stems(root: UPath) -> list[tuple[str, str]]:
    """(path, path without suffix) of all images below a directory."""
    return [(name, name.rpartition(".")[0]) for name in _images_below(root)]


def _pairs(images: dict[str, str], texts: UPath) -> Iterator[Entry]:
    base = texts.path.rstrip("/")
    captions = {name[len(base) + 1 : -4]: name for name in texts.fs.find(base) if name.endswith(".txt")}
    names = sorted(images)
    for start in range(0, len(names), BATCH_ENTRIES):
        chunk = names[start : start + BATCH_ENTRIES]
        paths = [captions[images[name]] for name in chunk if images[name] in captions]
        contents = dict(zip(paths, texts.fs.cat_ranges(paths, 0, MAX_LINE_BYTES, on_error="raise"), strict=True))
        for name in chunk:
            stem = images[name]
            if stem in captions:
                yield Entry(stem, name, [contents[captions[stem]].decode("utf-8", errors="replace")])
            else:
                yield Entry(stem, name, problem="image has no .txt file with its caption")
    for stem in sorted(captions.keys() - set(images.values())):
        yield Entry(stem, problem=f"'{stem}.txt' has no image")


def _images_below(root: UPath) -> list[str]:
    base = root.path.rstrip("/")
    return [name[len(base) + 1 :] for name in root.fs.find(base) if name.lower().endswith(IMAGE_SUFFIXES)]


LAYOUTS: dict[str, Layout] = {
    "sharegpt4v": sharegpt4v,
    "docci": jsonl,
    "iiw": iiw,
    "jsonl": jsonl,
    "dci": dci,
    "coco": coco,
    "flickr30k": flickr30k,
    "urban1k": urban1k,
    "folder": folder,
    "class_folders": class_folders,
}
"""Layouts with one file per image."""
