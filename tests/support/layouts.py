"""One small data set in every layout that people have."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.broken_rows import jpeg

IMAGES = {"a": jpeg(1), "b": jpeg(2), "c": jpeg(3)}
TEXTS = {"a": "A red house. It has a door.", "b": "A dog,\nasleep.", "c": "Ein grünes Fahrrad."}


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, image in IMAGES.items():
        (folder / f"{stem}.jpg").write_bytes(image)


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def sharegpt4v(folder: Path) -> Path:
    write_images(folder / "images" / "coco")
    return write_json(
        folder / "captions.json",
        [
            {
                "id": "same for all",
                "image": f"coco/{stem}.jpg",
                "conversations": [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text}],
            }
            for stem, text in TEXTS.items()
        ],
    )


def docci(folder: Path) -> Path:
    write_images(folder / "images")
    rows = [{"example_id": stem, "image_file": f"{stem}.jpg", "description": text} for stem, text in TEXTS.items()]
    return write_lines(folder / "docci.jsonlines", rows)


def iiw(folder: Path) -> Path:
    write_images(folder)
    rows = [{"image/key": f"{stem}", "image/url": "", "IIW": text, "caption": "x"} for stem, text in TEXTS.items()]
    return write_lines(folder / "data.jsonl", rows)


def jsonl(folder: Path) -> Path:
    write_images(folder)
    return write_lines(folder / "rows.jsonl", [{"id": s, "file_name": f"{s}.jpg", "text": t} for s, t in TEXTS.items()])


def csv_commas(folder: Path) -> Path:
    write_images(folder / "images")
    path = folder / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "caption"), *((f"{stem}.jpg", text) for stem, text in TEXTS.items())])
    return path


def csv_tabs(folder: Path) -> Path:
    write_images(folder)
    path = folder / "rows.tsv"
    path.write_text("".join(["filepath\ttext\n", *(f'{stem}.jpg\t"{text}"\n' for stem, text in TEXTS.items())]))
    return path


def coco(folder: Path) -> Path:
    write_images(folder)
    return write_json(
        folder / "captions_val.json",
        {
            "info": {"year": 2017},
            "images": [{"id": number, "file_name": f"{stem}.jpg"} for number, stem in enumerate(IMAGES)],
            "annotations": [{"image_id": number, "caption": text} for number, text in enumerate(TEXTS.values())],
        },
    )


def flickr30k(folder: Path) -> Path:
    write_images(folder / "images")
    path = folder / "results_20130124.token"
    path.write_text("".join(f"{stem}.jpg#0\t{text.replace(chr(10), ' ')}\n" for stem, text in TEXTS.items()))
    return path


def urban1k(folder: Path) -> Path:
    write_images(folder / "image")
    (folder / "caption").mkdir()
    for stem, text in TEXTS.items():
        (folder / "caption" / f"{stem}.txt").write_text(text)
    return folder


def image_folder(folder: Path) -> Path:
    write_images(folder)
    for stem, text in TEXTS.items():
        (folder / f"{stem}.txt").write_text(text)
    return folder


def img2dataset_files(folder: Path) -> Path:
    image_folder(folder / "00000")
    return folder


def webdataset(folder: Path) -> Path:
    for number, (stem, text) in enumerate(TEXTS.items()):
        metadata = json.dumps({"key": stem, "caption": text}).encode()
        members = [(f"{stem}.jpg", IMAGES[stem]), (f"{stem}.txt", text.encode()), (f"{stem}.json", metadata)]
        write_tar(folder / f"{number:05d}.tar", members)
    return folder


def compressed_tar(folder: Path) -> Path:
    members = [
        (f"x/{s}.{part}", data) for s in IMAGES for part, data in (("jpg", IMAGES[s]), ("txt", TEXTS[s].encode()))
    ]
    return write_tar(folder / "set.tar.gz", members)


def parquet_bytes(folder: Path) -> Path:
    return write_parquet(
        folder / "x.parquet", key=list(IMAGES), jpg=list(IMAGES.values()), caption=list(TEXTS.values())
    )


def parquet_structs(folder: Path) -> Path:
    images = [{"bytes": image, "path": f"{stem}.jpg"} for stem, image in IMAGES.items()]
    return write_parquet(folder / "x.parquet", id=list(IMAGES), image=images, text=list(TEXTS.values()))


def parquet_struct_paths(folder: Path) -> Path:
    write_images(folder / "images")
    images = [{"bytes": None, "path": f"{stem}.jpg"} for stem in IMAGES]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return write_parquet(folder / "x.parquet", id=list(IMAGES), image=image, text=list(TEXTS.values()))


def parquet_paths(folder: Path) -> Path:
    write_images(folder)
    paths = [f"{stem}.jpg" for stem in IMAGES]
    return write_parquet(folder / "x.parquet", id=list(IMAGES), image_path=paths, long_caption=list(TEXTS.values()))


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    layout.__name__: layout
    for layout in (
        *(
            sharegpt4v,
            docci,
            iiw,
            jsonl,
            csv_commas,
            csv_tabs,
            coco,
            flickr30k,
            urban1k,
            image_folder,
            img2dataset_files,
        ),
        *(webdataset, compressed_tar, parquet_bytes, parquet_structs, parquet_struct_paths, parquet_paths),
    )
}
