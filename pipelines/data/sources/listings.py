"""Annotation files and folders: turned, once, into Parquet of image references and captions.

A listing is a generator of entries; whatever its layout, the rest of the way is that of Parquet. Nothing is held in
memory but COCO's and Karpathy's captions, which those layouts keep apart from their images.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import PurePosixPath
from typing import Any

import ijson
import pyarrow as pa
from upath import UPath

from longclip.errors import DataError
from pipelines.common.parquet_set import open_parquet, parquet_writer
from pipelines.common.storage import Storage
from pipelines.common.whole_files import whole_file
from pipelines.data.sources.parquet import PROBLEM, ParquetSource, caption_texts, parquet_source
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.source import Piece, SourceRow
from pipelines.data.sources.tar import IMAGE_SUFFIXES

FILE = "entries.parquet"
BATCH_ENTRIES = 512
MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """A line of a listing."""

    id: str
    image: str | None = None
    """Path below the images' root, or URI."""
    captions: list[str] = field(default_factory=list)
    problem: str | None = None
    split: str | None = None
    """Part of the set that the layout says it belongs to."""


Listing = Callable[[UPath, UPath, SourceSettings], Iterator[Entry]]
"""(place of the annotations, root of the images, settings) -> entries."""


class ListingSource:
    """A source whose images stand in files of their own."""

    extra = pa.schema([])

    def __init__(
        self, field: str, path: UPath, kind: str, settings: SourceSettings, storage: Storage, images: UPath
    ) -> None:
        self.field, self.path, self.kind = field, path, kind
        self.settings, self.storage, self.images = settings, storage, images
        first = list(islice(self._entries(), BATCH_ENTRIES))
        if settings.split is not None and not first:
            raise DataError(f"{field}='{path}' has no entry of source.split='{settings.split}'")
        self.lists = any(len(entry.captions) > 1 for entry in first)
        self.table: ParquetSource | None = None

    def describe(self) -> str:
        """One line on what was found."""
        return (
            f"{self.kind}: {self.path}, images below {self.images}; captions are {'lists' if self.lists else 'texts'}"
        )

    def pieces(self, scratch: UPath) -> list[Piece]:
        """See `Source`; the entries are written to `scratch`."""
        path = scratch / FILE
        if not path.exists():
            schema = pa.schema([("id", pa.string()), ("image", pa.string()), ("caption", pa.list_(pa.string()))])
            schema = schema.append(pa.field(PROBLEM, pa.string()))
            entries = self._entries()
            with whole_file(path) as local, parquet_writer(local, schema) as output:
                while batch := list(islice(entries, BATCH_ENTRIES)):
                    rows = [
                        {"id": entry.id, "image": entry.image, "caption": entry.captions, PROBLEM: entry.problem}
                        for entry in batch
                    ]
                    output.add(pa.RecordBatch.from_pylist(rows, schema))
        return self._table(path).pieces(scratch)

    def read(self, piece: Piece) -> Iterator[SourceRow]:
        """See `Source`."""
        if self.table is None:
            self.table = self._table(UPath(piece.file, **self.storage.options(UPath(piece.file).protocol)))
        for row in self.table.read(piece):
            if len(row.captions) > 1 and not self.lists:
                row.problem = row.problem or "caption is a list, where the first entries have texts"
            yield row

    def _table(self, path: UPath) -> ParquetSource:
        data = open_parquet(self.field, str(path), self.storage, ["id"])
        # The images' root was looked up; the names of the columns are ours.
        settings = self.settings.model_copy(
            update={"id": "id", "image": "image", "caption": "caption", "label": None, "keep": []}
        )
        return parquet_source(self.field, data, settings, self.storage, self.images, self.kind)

    def _entries(self) -> Iterator[Entry]:
        try:
            wanted = self.settings.split
            entries = LISTINGS[self.kind](self.path, self.images, self.settings)
            chosen = (entry for entry in entries if wanted in (None, entry.split))
            yield from islice(chosen, self.settings.first_rows)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise DataError(
                f"{self.field}='{self.path}' cannot be read as {self.kind}: {' '.join(str(error).split())[:200]}"
            ) from error


def object_entry(
    number: int, item: Any, settings: SourceSettings, text_of: Callable[[Any], Any] = lambda value: value
) -> Entry:
    """Entry of a JSON object, by the names that the settings give or the usual ones.

    Args:
        number: place in the file, which is its id if it has none.
        item: the object.
        settings: names of its fields.
        text_of: gives the text, or texts, of the caption's value.
    """
    if not isinstance(item, dict):
        return Entry(f"{number:08d}", problem=f"entry is no object but {type(item).__name__}")
    id_name = first_known(settings.id, ID_NAMES, item)
    key = str(item[id_name]) if id_name and item[id_name] not in (None, "") else f"{number:08d}"
    image_name = first_known(settings.image, IMAGE_NAMES, item)
    caption_name = first_known(settings.caption, CAPTION_NAMES, item)
    image = item[image_name] if image_name else None
    if not isinstance(image, str) or not image:
        return Entry(key, problem="entry has no image")
    if caption_name is None:
        return Entry(key, image, problem="entry has no caption")
    captions, problem = caption_texts(text_of(item[caption_name]))
    return Entry(key, image, captions, problem, item.get("split"))


def sharegpt4v(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """A JSON list of `{id, image, conversations: [{from, value}, ...]}`: the caption is the model's first answer."""
    with path.open("rb") as file:
        for number, item in enumerate(ijson.items(file, "item", use_float=True)):
            entry = object_entry(number, item, settings, _answer)
            # Different sources of ShareGPT4V number their images alike: the path of the image is what is unique.
            yield replace(entry, id=entry.image) if settings.id is None and entry.image else entry


def _answer(conversation: Any) -> Any:
    if not isinstance(conversation, list) or not all(isinstance(turn, dict) for turn in conversation):
        return conversation
    answers = [turn.get("value") for turn in conversation if turn.get("from") in ("gpt", "assistant")]
    return answers[0] if answers else None


def jsonl(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """One JSON object a line, also DOCCI's `{example_id, image_file, description}`."""
    for number, item in _json_lines(path):
        yield item if isinstance(item, Entry) else object_entry(number, item, settings)


def iiw(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """IIW's `{image/key, image/url, IIW}` a line; the image is the file of that key, or else the URL."""
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
                yield number, Entry(f"{number:08d}", problem=f"line {number + 1} is no JSON: {error}")


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
                yield Entry(f"{number:08d}", problem=f"entry is no object but {type(item).__name__}")
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
        yield Entry(str(key), problem=f"{len(texts)} captions of an image that is not listed")


def flickr30k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Lines of `file#number<TAB>caption`; those of an image stand together."""

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
    """`annotations/*.json` of `{image, short_caption, extra_caption}`: DCI's extended caption is both, in lines."""
    base = path.path.rstrip("/")
    for name in sorted(found for found in path.fs.find(f"{base}/annotations") if found.endswith(".json")):
        key = PurePosixPath(name).stem
        try:
            item = json.loads(path.fs.cat_file(name))
            caption = f"{item['short_caption']}\n{item['extra_caption']}"
            yield Entry(key, item["image"], [caption])
        except (ValueError, KeyError, TypeError) as error:
            yield Entry(key, problem=f"'{key}.json' is no annotation of DCI: {type(error).__name__}: {error}")


def class_folders(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """A folder for each class; its name stands in the caption's place."""
    for name in sorted(_images_below(path)):
        label, inside, _ = name.partition("/")
        yield Entry(name, name, [label]) if inside else Entry(name, problem="image stands in no folder of a class")


def urban1k(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """`image/{n}.jpg` and `caption/{n}.txt`, joined by their stem."""
    yield from _pairs(dict(_stems(images)), path / "caption")


def folder(path: UPath, images: UPath, settings: SourceSettings) -> Iterator[Entry]:
    """Images with `.txt` beside them, also in subfolders, as img2dataset's `files` layout has them."""
    yield from _pairs(dict(_stems(images)), path)


def _stems(root: UPath) -> list[tuple[str, str]]:
    """(image, the same without its suffix) of all images below a place."""
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
                yield Entry(stem, name, problem="image has no .txt with its caption")
    for stem in sorted(captions.keys() - set(images.values())):
        yield Entry(stem, problem=f"'{stem}.txt' has no image")


def _images_below(root: UPath) -> list[str]:
    base = root.path.rstrip("/")
    return [name[len(base) + 1 :] for name in root.fs.find(base) if name.lower().endswith(IMAGE_SUFFIXES)]


LISTINGS: dict[str, Listing] = {
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
"""Layouts whose images stand in files of their own."""
