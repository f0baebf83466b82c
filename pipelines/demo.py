"""The whole way on this machine: synthetic scenes, a small base CLIP, fine-tuning, benchmark, registry, index, search.

Runs the other entries one after the other on one local Ray, with MLflow on SQLite, all below one directory. Steps that
were done before with the same settings are not done again. Ends with the table of retrieval before and after and,
unless serve=false, with a running search page.

    python pipelines/demo.py
    python pipelines/demo.py --set serve=false --set directory=/tmp/demo
"""

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import ray
import yaml
from pydantic import PositiveInt

from longclip.errors import LongClipError
from pipelines import tracking
from pipelines.benchmark import TABLE
from pipelines.entry import connect, run_entry
from pipelines.settings import Settings, load_settings, storage_path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "pipelines" / "configs"
PROGRESS = re.compile(r"(step \d+/\d+: .*|embedding with .*|\w+: \d+ rows in, .*|error: .*|warning: .*)")
CPUS = 4
START_SECONDS = 180


class DemoSettings(Settings):
    """Everything that defines a demo."""

    directory: str = "var/demo"
    """Local directory that everything is written to."""
    train_rows: PositiveInt = 9600
    """Synthetic scenes to train on."""
    test_rows: PositiveInt = 500
    """Synthetic scenes to search; every four of them differ only behind token 77 of their captions."""
    serve: bool = True
    """End with a running search page."""
    port: PositiveInt = 8000
    """Port of the search page, on the loopback interface."""


def main() -> None:
    """The entry."""
    settings = load_settings(DemoSettings, __doc__ or "")
    started = time.monotonic()
    directory = Path(storage_path("directory", settings.directory))
    os.environ["MLFLOW_TRACKING_URI"] = tracking.tracking_uri(directory)
    connect(CPUS)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    steps = demo_steps(settings, directory)
    for number, (name, command) in enumerate(steps.items(), start=1):
        run_step(f"[{number}/{len(steps)}] {name}", name, command, directory)
    print(f"\nSynthetic scenes, {settings.test_rows} held out, before and after:\n")
    print((directory / "benchmark" / TABLE).read_text())
    print(f"demo: {len(steps)} steps, {time.monotonic() - started:.0f} s; everything is in {directory}", flush=True)
    if settings.serve:
        serve(directory, settings.port)


def demo_steps(settings: DemoSettings, directory: Path) -> dict[str, list[str]]:
    """The entries of the demo with their settings, in order."""
    train, test = directory / "scenes-train", directory / "scenes-test"
    summarized, base = directory / "summarized", directory / "base"
    finetuned, bench = directory / "finetuned", directory / "benchmark"
    base_checkpoint, checkpoint = base / "checkpoint", finetuned / "checkpoint"
    return {
        "draw scenes to train on": entry("sample_data", rows=settings.train_rows, output=train),
        "draw scenes to search": entry("sample_data", rows=settings.test_rows, group_size=4, seed=1, output=test),
        "train a base CLIP (77 tokens)": entry("finetune", "demo_base.yaml", **{"data.train": train, "output": base}),
        "summarize captions": entry("summarize", input=train, output=summarized),
        "stretch and fine-tune (248 tokens)": entry(
            "finetune",
            "demo_finetune.yaml",
            **{"data.train": summarized, "model.base": base_checkpoint, "output": finetuned},
        ),
        "benchmark": entry(
            "benchmark",
            data=test,
            texts="[caption, short_caption]",
            models=f"{{base: {base_checkpoint}, finetuned: {checkpoint}}}",
            output=bench,
        ),
        "register": entry("register", checkpoint=checkpoint, results=bench / "results.json", alias="champion"),
        "embed the scenes": entry("embed", data=test, model=checkpoint, output=directory / "index"),
    }


def entry(name: str, config: str | None = None, **settings: object) -> list[str]:
    """Command line of an entry."""
    command = [sys.executable, str(ROOT / "pipelines" / f"{name}.py")]
    command += ["--config", str(CONFIGS / config)] if config else []
    return command + [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def run_step(title: str, name: str, command: list[str], directory: Path) -> None:
    """Run one step, showing its progress; its whole output goes to a log file.

    Raises:
        LongClipError: the step failed; the message says where its log is.
    """
    slug = "-".join(re.findall(r"\w+", name))
    log, done = directory / "logs" / f"{slug}.log", directory / "done" / f"{slug}.json"
    receipt = json.dumps({"command": command[1:], "configs": _config_digest(command)})
    if done.is_file() and done.read_text() == receipt:
        print(f"{title}: done before", flush=True)
        return
    print(f"{title}\n    {shlex.join(['python', *command[1:]])}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(log, "w") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process,
    ):
        for line in process.stdout or ():
            file.write(line)
            shown = PROGRESS.search(line)
            if shown:
                print(f"    {shown[0].rstrip()}", flush=True)
    if process.returncode:
        raise LongClipError(f"step '{name}' failed with exit code {process.returncode}; see {log}")
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(receipt)


def _config_digest(command: list[str]) -> str:
    files = [Path(part).read_bytes() for part in command if part.endswith(".yaml")]
    return hashlib.sha256(b"".join(files)).hexdigest()


def serve(directory: Path, port: int) -> None:
    """Run the search application on the demo's Ray until Ctrl-C or SIGTERM."""
    url = f"http://127.0.0.1:{port}"
    config = directory / "serve.yaml"
    config.write_text(yaml.safe_dump(serve_config(directory, port), sort_keys=False))
    serve_program = str(Path(sys.executable).with_name("serve"))
    command = [serve_program, "run", "--address", os.environ["RAY_ADDRESS"], str(config)]
    log = directory / "logs" / "serve.log"
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        if _wait_until_ready(url, process):
            print(f"\nsearch page: {url}    (Ctrl-C ends it; log: {log})", flush=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()
            return
    if process.returncode not in (0, -signal.SIGTERM):
        raise LongClipError(f"serving stopped with exit code {process.returncode}; see {log}")


def serve_config(directory: Path, port: int) -> Mapping[str, object]:
    """What `serve run` starts: the registered champion with the index that was made from it."""
    arguments = {"model": "models:/longclip@champion", "index": str(directory / "index")}
    application = {"name": "longclip", "import_path": "serving.app:build", "args": arguments}
    return {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return False


if __name__ == "__main__":
    run_entry(main)
