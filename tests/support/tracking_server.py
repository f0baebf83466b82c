"""An MLflow server as teams run it: a process of its own, PostgreSQL behind it, artifacts in S3."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

from tests.support.programs import program
from tests.support.s3_server import KEY, SECRET, S3Server, free_ports

START_SECONDS = 60
BUCKET = "mlflow"


class Postgres:
    """A database of its own on loopback. PostgreSQL does not run as root, so its own user runs it then."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "postgres"
        self.directory.mkdir()
        (self.port,) = free_ports(1)
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            for folder in (directory, *directory.parents):
                folder.chmod(folder.stat().st_mode | 0o011)  # so that it can get to its files
                if folder.name.startswith("pytest-of-"):
                    break
            shutil.chown(self.directory, self._user)
        self._run("initdb", "--auth=trust", "--username=mlflow", "--no-sync", "-D", str(self.directory / "data"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Address for SQLAlchemy."""
        return f"postgresql://mlflow@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [str(program("postgres")), "-D", str(self.directory / "data"), "-p", str(self.port)]
        command += ["-h", "127.0.0.1", "-k", "", "-c", "fsync=off"]
        with open(os.devnull, "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", user=self._user)
        deadline = time.monotonic() + START_SECONDS
        ready = [str(program("pg_isready")), "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert self._process.poll() is None, "PostgreSQL did not start"
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def stop(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)

    def _run(self, name: str, *arguments: str) -> None:
        subprocess.run([str(program(name)), *arguments], check=True, capture_output=True, cwd="/", user=self._user)


def mlflow_command(host: str, port: int, database: str) -> list[str]:
    """The command line of a tracking server that hands artifacts on to S3."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    return [*command, "--backend-store-uri", database, "--artifacts-destination", f"s3://{BUCKET}/artifacts"]


class MlflowServer:
    """A tracking server whose clients need nothing but its address: it hands artifacts on to S3 itself."""

    def __init__(self, directory: Path, postgres: Postgres, s3: S3Server) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self._log = directory / "mlflow.log"
        self._command = mlflow_command("127.0.0.1", port, postgres.uri)
        self._environment = os.environ | {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": s3.url,
        }
        self._environment.pop("MLFLOW_TRACKING_URI", None)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.2)

    def stop(self) -> None:
        """`kill -9` of it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except (URLError, OSError):
            return False
