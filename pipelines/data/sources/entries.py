"""Entries of annotation files and folders: an image and its captions, from JSON objects and other records."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from upath import UPath

from pipelines.data.sources.captions import caption_texts
from pipelines.data.sources.image_references import MAX_SHOWN, unusable_reference
from pipelines.data.sources.settings import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, SourceSettings, first_known
from pipelines.data.sources.text_decoding import is_unicode, printable


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


def object_entry(number: int, item: Any, settings: SourceSettings, problem: str | None = None) -> Entry:
    """Entry of a JSON object, by the field names in the settings or well-known ones; null fields are absent.

    Args:
        number: position in the file; the id, if the object has none.
        item: the object.
        settings: names of its fields.
        problem: with the object, if it is known already.
    """
    if not isinstance(item, dict):
        return Entry(f"{number:08d}", problem=problem or f"entry is not a JSON object but {type(item).__name__}")
    present = {key: value for key, value in item.items() if value is not None}
    id_name = first_known(settings.id, ID_NAMES, present)
    key = str(present[id_name]) if id_name and present[id_name] != "" else f"{number:08d}"
    image, image_problem = _image(present, settings)
    caption_name = first_known(settings.caption, CAPTION_NAMES, present)
    captions, caption_problem = caption_texts(present[caption_name]) if caption_name else ([], "entry has no caption")
    return Entry(key, image, captions, problem or image_problem or caption_problem, present.get("split"))


def storable(entry: Entry) -> Entry:
    """The entry as it can be written to Parquet: one with unusable texts gets a problem instead. It keeps an image that
    can be read, which is all that matters in an evaluation set."""
    unusable = unusable_reference(entry.image) if entry.image is not None else None
    problem = entry.problem or unusable
    for name, text in [("id", entry.id), *(("caption", caption) for caption in entry.captions)]:
        if not problem and not is_unicode(text):
            problem = f"{name} '{printable(text, MAX_SHOWN)}' is not valid Unicode: it has half of a surrogate pair"
    if not problem:
        return entry
    captions = [printable(caption) for caption in entry.captions]
    image = None if unusable else entry.image
    return replace(entry, id=printable(entry.id, MAX_SHOWN), image=image, captions=captions, problem=printable(problem))


def _image(item: dict[str, Any], settings: SourceSettings) -> tuple[str | None, str | None]:
    """Reference to the image of an object, and the problem with it, if any."""
    name = first_known(settings.image, IMAGE_NAMES, item)
    image = item[name] if name else None
    if isinstance(image, list):
        if len(image) > 1:
            return None, f"entry has {len(image)} images; a row has one"
        image = next(iter(image), None)
    if isinstance(image, dict):
        image = image.get("path")
    return (image, None) if isinstance(image, str) and image else (None, "entry has no image")
