"""Steps of the demo and the study: entries that run one after the other in one process; and the search page."""

import contextlib
import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import httpx
import yaml

from longclip.errors import LongClipError
from pipelines.common.entry import user_error
from pipelines.common.events import listen

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "pipelines" / "configs"
START_SECONDS = 180


class Step:
    """An entry with its settings: a double underscore in a name means a dot, a mapping is given as JSON."""

    def __init__(self, title: str, entry: ModuleType, config: str | None = None, **settings: object) -> None:
        self.title, self.entry = title, entry
        self.config = CONFIGS / f"{config}.yaml" if config else None
        self.argv = ["--config", str(self.config)] if self.config else []
        for name, value in settings.items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
            self.argv += ["--set", f"{name.replace('__', '.')}={text}"]

    @property
    def command(self) -> str:
        """The equivalent command line."""
        return shlex.join(["python", f"pipelines/{self.entry.__name__.rpartition('.')[2]}.py", *self.argv])

    @property
    def receipt(self) -> str:
        """Changes if the step, its settings or its config file change."""
        config = self.config.read_bytes() if self.config else b""
        return json.dumps({"command": self.command, "config": hashlib.sha256(config).hexdigest()})


def run_step(number: str, step: Step, directory: Path) -> None:
    """Run a step in this process, so that all share one Ray job and its warm workers.

    Its progress is printed here; all of its output goes to a log file.

    Raises:
        LongClipError: the step failed; the message says why, and where its log is.
    """
    slug = "-".join(re.findall(r"\w+", step.title))
    log, done = directory / "logs" / f"{slug}.log", directory / "done" / f"{slug}.json"
    if done.is_file() and done.read_text() == step.receipt:
        print(f"{number} {step.title}: done before", flush=True)
        return
    print(f"{number} {step.title}\n    {step.command}", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = sys.stdout

    def show(line: str) -> None:
        print(f"    {line}", file=terminal, flush=True)

    with open(log, "w", buffering=1) as file, listen(show):
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                step.entry.main(step.argv)
        except Exception as error:
            reason = user_error(error) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise LongClipError(f"step '{step.title}' failed: {reason}; its log is {log}") from error
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(step.receipt)


def serve(directory: Path, port: int, ray_address: str) -> None:
    """Serve the registered champion and its index until Ctrl-C or SIGTERM."""
    url = f"http://127.0.0.1:{port}"
    arguments = {"model": "models:/longclip@champion", "index": str(directory / "index")}
    application = {"name": "longclip", "import_path": "serving.app:build", "args": arguments}
    config = directory / "serve.yaml"
    http = {"host": "127.0.0.1", "port": port}
    config.write_text(yaml.safe_dump({"http_options": http, "applications": [application]}, sort_keys=False))
    program = str(Path(sys.executable).with_name("serve"))
    command = [program, "run", "--address", ray_address, str(config)]
    log = directory / "logs" / "serve.log"
    with open(log, "w") as file, subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        if _wait_until_ready(url, process):
            print(f"\nsearch page: {url}    (Ctrl-C stops it; log: {log})", flush=True)
        try:
            process.wait()
        except KeyboardInterrupt:
            process.wait()
            return
    if process.returncode not in (0, -signal.SIGTERM):
        raise LongClipError(f"serving stopped with exit code {process.returncode}; see {log}")


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return True
        except httpx.TransportError:
            pass
        time.sleep(1)
    return False
