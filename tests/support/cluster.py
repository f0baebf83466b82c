"""A Ray cluster, S3, MLflow, Redis and a laptop on machines of their own (`tests.support.network`)."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.network import Machine, Network
from tests.support.s3_server import KEY, SECRET, s3_command
from tests.support.tracking_server import BUCKET, mlflow_command

TOKEN = "a-token-for-tests-0123456789abcdef"
REDIS_PASSWORD = "a-password-for-tests"
DEADLINE_SECONDS = 600
S3_PORTS = {"s3": 8333, "master": 9333, "volume": 8080, "filer": 8888}
S3_CLIENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://s3:8333",
}
RAY_CLIENT = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
NODE = {
    **S3_CLIENT,
    **RAY_CLIENT,
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_OFFLINE": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.middleware:before_serve",
    # A node that does not answer is given up after some 12 s; Ray's own patience is half a minute, for which a test
    # would only wait. It is not shorter because two cores that run seven machines answer late.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "OMP_NUM_THREADS": "1",  # threads of several processes that wait for each other on two cores mostly wait
    "RAY_worker_niceness": "0",  # or everything else on this host would go first
    # Ray Train takes one report from a worker per such period. A training that reports every step has that much time
    # per step, in which a test can interrupt it.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
OF_THE_HEAD = {"RAY_REDIS_ADDRESS": "redis:6379", "RAY_external_storage_namespace": "longclip"}
"""What the head knows of its cluster outlives it, as in the overlay `high-availability` of `infra/kubernetes`."""
PROCESSES_OF_RAY = "gcs_server|raylet|dashboard.py|ray::"
MAKE_BUCKETS = """
import boto3, sys
s3 = boto3.client("s3")
for name in sys.argv[1:]:
    s3.create_bucket(Bucket=name)
"""


class Cluster:
    """A Ray head and workers, as `infra/compose.yaml` has them, but each with a kernel's idea of a machine."""

    TRAINING_CPUS, WORKER_CPUS = 3, 5
    """One training worker and one replica fit a machine, two training workers do not."""

    def __init__(self, directory: Path) -> None:
        """
        Args:
            directory: what all machines see, as a shared filesystem is.
        """
        self.directory = directory
        self.network = Network(directory)
        self.s3, self.mlflow, self.redis = (self.network.add(name) for name in ("s3", "mlflow", "redis"))
        self.head, self.laptop = self.network.add("head"), self.network.add("laptop")
        self._running: dict[Machine, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start everything, with two workers, and wait until it answers."""
        self.start_s3()
        self.laptop.wait_for("python", "-c", MAKE_BUCKETS, "data", BUCKET, environment=S3_CLIENT)
        self.start_mlflow()
        self.redis.start("redis-server", "--bind", "0.0.0.0", "--save", "", "--requirepass", REDIS_PASSWORD)
        options = ["--head", f"--dashboard-host={self.network.address('head')}", "--num-cpus=1"]
        self._start_node(self.head, *options, f"--redis-password={REDIS_PASSWORD}", environment=NODE | OF_THE_HEAD)
        for name in ("worker-1", "worker-2"):
            self.add_worker(name)
        self.wait_for_workers("worker-1", "worker-2")
        self.laptop.wait_for("curl", "--fail", "http://mlflow:5000/health")

    def start_s3(self) -> None:
        """Start SeaweedFS; it answers when it answers."""
        command = s3_command(self.directory, self.network.address("s3"), S3_PORTS)
        self._running[self.s3] = self.s3.start(*command)

    def start_mlflow(self) -> None:
        """Start a tracking server; it answers when it answers."""
        command = mlflow_command("0.0.0.0", 5000, f"sqlite:///{self.directory}/mlflow.db")
        environment = S3_CLIENT | {
            "MLFLOW_S3_ENDPOINT_URL": S3_CLIENT["AWS_ENDPOINT_URL"],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # five more processes, for what nobody asks of it here
        }
        self._running[self.mlflow] = self.mlflow.start(
            *command, "--allowed-hosts", "mlflow:5000", environment=environment
        )

    def kill(self, machine: Machine) -> None:
        """`kill -9` of what was started on a machine."""
        process = self._running.pop(machine)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def add_worker(self, name: str) -> None:
        """Another machine in the cluster. When its node ends it starts again, as containers do."""
        machine = self.network.add(name)
        self._start_node(machine, "--address=head:6379", f"--num-cpus={self.WORKER_CPUS}")

    def kill_head(self) -> None:
        """`kill -9` of all that Ray runs on the head, which then starts again."""
        self.head.run("pkill", "--signal", "KILL", "--full", PROCESSES_OF_RAY)

    def _start_node(self, machine: Machine, *options: str, environment: dict[str, str] = NODE) -> None:
        command = ["ray", "start", *options, f"--node-ip-address={self.network.address(machine.name)}"]
        command += ["--object-store-memory=150000000", "--disable-usage-stats", "--block"]
        machine.keep_running(*command, environment=environment)

    def workers(self) -> set[str]:
        """Names of the workers that the head believes to be alive; none while it does not answer."""
        answer = self.ask("http://head:8265/nodes?view=summary", token=TOKEN) or {"data": {"summary": []}}
        # A head that has just started knows less of them.
        states = {node.get("ip"): node.get("raylet", {}).get("state") for node in answer["data"]["summary"]}
        alive = {address for address, state in states.items() if state == "ALIVE"}
        return {name for name in self.network.machines if self.network.address(name) in alive} - {"head"}

    def wait_for_workers(self, *names: str) -> None:
        """Return when these are the ones."""
        end = time.monotonic() + DEADLINE_SECONDS
        while (found := self.workers()) != set(names):
            assert time.monotonic() < end, found
            time.sleep(0.5)

    def ask(self, url: str, body: Any = None, token: str | None = None) -> Any:
        """What a server answers to the laptop; None where it does not."""
        command = ["curl", "--silent", "--max-time", "60", url]
        command += ["--header", f"Authorization: Bearer {token}"] if token else []
        command += ["--json", json.dumps(body)] if body is not None else []
        done = self.laptop.run(*command)
        try:
            return json.loads(done.stdout)
        except ValueError:
            return None

    def submit(self, verb: str, **settings: object) -> "Job":
        """Submit an entry from the laptop; a double underscore in a setting stands for the dot."""
        return Job(self, verb, {name.replace("__", "."): value for name, value in settings.items()})

    def close(self) -> None:
        """End all machines."""
        self.network.close()


class Job:
    """An entry that the laptop has submitted, and whose output it follows."""

    def __init__(self, cluster: Cluster, verb: str, settings: dict[str, object]) -> None:
        entry = ["python", f"pipelines/{verb}.py"]
        entry += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        self.log = cluster.directory / f"{verb}.{time.monotonic_ns()}.log"
        command = ["ray", "job", "submit", "--address=http://head:8265", "--working-dir=.", "--", *entry]
        environment = RAY_CLIENT | {"PYTHONUNBUFFERED": "1"}  # its output is followed
        self.process = cluster.laptop.start(*command, environment=environment, log=self.log)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def finish(self) -> str:
        """Output of a job that ends well."""
        code = self.process.wait(DEADLINE_SECONDS)
        assert code == 0, self.output()
        return self.output()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return when something has happened that the job does."""
        end = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < end, self.output()
            time.sleep(0.01)

    def steps(self) -> list[int]:
        """Steps of a training that were reported."""
        return [int(step) for step in re.findall(r"step (\d+)/\d+: loss", self.output())]
