"""From raw rows to a search on a cluster of several machines with a network, and recovery from failures.

One cluster goes all the way once, because each job costs more to start than to run. Two trainings are disturbed in
different ways, and must have the same result.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from longclip.checkpoint import new_model, save_checkpoint
from tests.support.cluster import RAY_CLIENT, S3_CLIENT, TOKEN, Cluster, Job
from tests.support.network import why_no_machines
from tests.support.pictures import picture
from tests.support.places import ROOT
from tests.support.programs import needs_programs
from tests.support.tiny_clip import tiny_config
from tests.support.trained import assert_equal_weights, registered_step

NO_MACHINES = why_no_machines()
pytestmark = [
    pytest.mark.slow,
    needs_programs("ip", "unshare", "nsenter", "curl", "redis-server", packages="iproute2, curl, redis-server"),
    pytest.mark.skipif(bool(NO_MACHINES), reason=NO_MACHINES),
]

ROWS, GLOBAL_BATCH, EPOCHS, EVERY = 96, 16, 3, 3
STEPS = ROWS // GLOBAL_BATCH * EPOCHS
CAPTION = "A first sentence. Picture number {} is here. It has many dots."
OUTAGE_SECONDS = 8
UPLOAD = "import boto3, sys; boto3.client('s3').upload_file(sys.argv[1], 'data', 'rows.parquet')"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Machines, with captions and pictures in S3 and an untrained base on the shared disk."""
    directory = tmp_path_factory.mktemp("cluster")
    cluster = Cluster(directory)
    try:
        cluster.start()
        rows = [{"id": f"row-{row:03d}", "image": picture(row), "caption": CAPTION.format(row)} for row in range(ROWS)]
        pq.write_table(pa.Table.from_pylist(rows), directory / "rows.parquet", row_group_size=16)
        assert not cluster.laptop.run(
            "python", "-c", UPLOAD, f"{directory}/rows.parquet", environment=S3_CLIENT
        ).returncode
        torch.manual_seed(0)
        save_checkpoint(new_model(tiny_config(context_length=77)), directory / "base", {"origin": "test"})
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def summarized(cluster: Cluster) -> str:
    """The rows after prepare and summarize."""
    clean, summarized = "s3://data/clean", "s3://data/summarized"
    prepared = cluster.submit("prepare", input="s3://data/rows.parquet", output=clean, source__rows_per_piece=16)
    assert f"prepare: {ROWS} rows in, {ROWS} out, 0 rejected" in prepared.finish()
    done = cluster.submit("summarize", input=clean, output=summarized, strategy="[extractive,drop_first]").finish()
    assert f"summarize: {ROWS} rows in, {ROWS} out, 0 rejected" in done
    return summarized


def train(cluster: Cluster, data: str, output: Path) -> Job:
    """Start a training with a worker on each of two machines."""
    return cluster.submit(
        "finetune",
        input=data,
        data__shuffle_window=48,
        model__base=cluster.directory / "base",
        optim__per_worker_batch_size=GLOBAL_BATCH // 2,
        optim__epochs=EPOCHS,
        optim__learning_rate=1e-3,
        optim__warmup_steps=5,
        loss__pca_dim=4,
        workers__count=2,
        workers__cpus=cluster.TRAINING_CPUS,
        workers__max_failures=6,
        checkpoints__every_steps=EVERY,
        log_every_steps=1,
        output=output,
    )


@pytest.fixture(scope="module")
def trained(cluster: Cluster, summarized: str) -> Job:
    """A training run during which S3 and then MLflow were killed and restarted."""
    training = train(cluster, summarized, cluster.directory / "outage")
    training.wait_for((cluster.directory / "outage" / ".run").exists)  # rows are read next
    cluster.kill(cluster.s3)
    time.sleep(OUTAGE_SECONDS)
    assert training.process.poll() is None, training.output()
    assert not training.steps(), "steps without data"
    cluster.kill(cluster.mlflow)
    cluster.start_s3()
    training.wait_for(lambda: "MLflow does not take metrics" in training.output())
    cluster.start_mlflow()
    training.finish()
    return training


@pytest.fixture(scope="module")
def served(cluster: Cluster, summarized: str, trained: Job) -> None:
    """The trained model, registered, and an index of the rows, both deployed on the cluster."""
    checkpoint = cluster.directory / "outage" / "checkpoint"
    registered = cluster.submit("register", checkpoint=checkpoint, alias="champion").finish()
    assert "models:/longclip/1, alias champion, at http://mlflow:5000" in registered
    embedded = cluster.submit(
        "embed",
        input=summarized,
        model="models:/longclip@champion",
        cache=cluster.directory / "cache",
        output="s3://data/index",
    )
    assert f"{ROWS} embedded" in embedded.finish()
    config = (ROOT / "infra" / "serve.yaml").read_text()
    for name, value in (("proxy_location", "EveryNode"), ("host", "0.0.0.0"), ("index", "s3://data/index")):
        config = re.sub(rf"^( *{name}): .*$", rf"\1: {value}", config, flags=re.MULTILINE)
    (cluster.directory / "serve.yaml").write_text(config)
    deploy(cluster)
    cluster.laptop.wait_for("curl", "--fail", "http://head:8000/readyz")


def deploy(cluster: Cluster) -> None:
    command = ["serve", "deploy", f"{cluster.directory}/serve.yaml", "--address=http://head:8265"]
    deployed = cluster.laptop.run(*command, environment=RAY_CLIENT)
    assert deployed.returncode == 0, deployed.stderr


def nearest(cluster: Cluster, node: str = "head") -> str:
    """Id of the best hit for the caption of row 7, from a search on one node."""
    query = {"query": {"text": CAPTION.format(7)}, "target": "caption", "top_k": 1}
    return cluster.ask(f"http://{node}:8000/v1/search", query)["hits"][0]["id"]


def test_requests_without_a_token_are_rejected(cluster: Cluster) -> None:
    refused = cluster.laptop.run("curl", "--silent", "--write-out", "%{http_code}", "http://head:8265/api/jobs/")
    assert refused.stdout.endswith("401")
    assert cluster.ask("http://head:8265/api/jobs/", token=TOKEN) is not None


def test_search_over_an_index_built_on_the_cluster(cluster: Cluster, served: None) -> None:
    info = cluster.ask("http://head:8000/info")
    assert (info["model"]["id"], info["model"]["version"]) == ("longclip", "1")
    assert (info["index"]["count"], info["index"]["checkpoint_id"]) == (ROWS, info["model"]["checkpoint_id"])
    assert nearest(cluster) == "row-007"


def test_training_survives_outages_of_s3_and_mlflow(cluster: Cluster, trained: Job) -> None:
    """No step is repeated, and MLflow has all of them in the end."""
    assert "warning: MLflow does not take metrics; training continues" in trained.output()
    assert trained.steps() == [*range(1, STEPS + 1)]
    (run,) = re.findall(r"MLflow run (\w+) at http://mlflow:5000", trained.output())
    history = f"http://mlflow:5000/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=loss"
    assert sorted(metric["step"] for metric in cluster.ask(history)["metrics"]) == trained.steps()


def test_training_survives_a_lost_machine_and_a_partition(cluster: Cluster, summarized: str, served: None) -> None:
    """One worker is powered off and replaced; then the other one is unplugged until the head declares it dead."""
    output = cluster.directory / "lost"
    kept, lost = sorted(cluster.workers())
    training = train(cluster, summarized, output)
    training.wait_for(lambda: registered_step(output) >= EVERY)
    cluster.network.machines[lost].power_off()
    reached = registered_step(output)
    cluster.add_worker("replacement")
    # One checkpoint may have been in flight; the next one needs both workers.
    training.wait_for(lambda: registered_step(output) >= reached + 2 * EVERY)
    cluster.network.unplug(kept)
    cluster.wait_for_workers("replacement")
    assert training.process.poll() is None, training.output()
    assert not (output / "checkpoint").exists(), "training ended before the loss was noticed"
    cluster.network.plug_in(kept)
    training.finish()
    cluster.wait_for_workers(kept, "replacement")
    assert training.steps()[-1] == STEPS
    assert_equal_weights(output, cluster.directory / "outage")
    cluster.laptop.wait_for("curl", "--fail", "http://head:8000/readyz")
    assert nearest(cluster) == "row-007"


def test_workers_serve_while_the_head_is_down(cluster: Cluster, served: None) -> None:
    """The proxy of a worker answers without a head; the restarted head restores its cluster from Redis."""
    worker = next(name for name in cluster.workers() if cluster.ask(f"http://{name}:8000/readyz"))
    cluster.kill_head()
    assert not cluster.workers(), "the head still answers"
    answers = 0
    while not cluster.workers():
        assert nearest(cluster, worker) == "row-007"
        answers += 1
    assert answers
    cluster.laptop.wait_for("curl", "--fail", "http://head:8000/readyz")
    assert nearest(cluster) == "row-007"
    config = (cluster.directory / "serve.yaml").read_text()
    (cluster.directory / "serve.yaml").write_text(config.replace('revision: ""', "revision: later"))
    deploy(cluster)
    is_running = "serve status --address=http://head:8265 | grep -A1 longclip: | grep RUNNING"
    cluster.laptop.wait_for("sh", "-c", is_running, environment=RAY_CLIENT)
    assert nearest(cluster) == nearest(cluster, worker) == "row-007"
    print(f"\nhead killed: {worker} gave {answers} answers without it, and the new head deployed again")
