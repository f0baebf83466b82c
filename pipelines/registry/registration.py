"""Registering a checkpoint: the model that MLflow stores, its source run, and its card."""

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema
from PIL import Image

import longclip
from longclip.checkpoint import checkpoint_id, load_checkpoint, verify_checkpoint
from longclip.errors import CheckpointError
from longclip.files import MANIFEST, file_sha256
from longclip.lineage import read_lineage, read_metadata
from longclip.model_uri import CHECKPOINT_ARTIFACT, MANIFEST_TAG
from pipelines.registry.cards import CARD
from pipelines.registry.model_card import description, model_card
from pipelines.registry.runs import end_run, existing_run, log_metrics, start_run
from pipelines.registry.server import explained

CHECKPOINT = CHECKPOINT_ARTIFACT.rpartition("/")[2]
PYFUNC_MODEL = Path(__file__).with_name("pyfunc_model.py")
CORE = ("numpy", "pillow", "safetensors", "simplejpeg", "torch", "transformers")
"""Requirements of the library, which the model carries; MLflow adds itself."""


def register_checkpoint(
    uri: str,
    directory: Path,
    name: str,
    experiment: str,
    metrics: Mapping[str, float],
    alias: str,
    measured: Sequence[str] = (),
) -> int:
    """Register a checkpoint directory as a new version of a model and point an alias at it.

    The source run of the version is the run that trained the checkpoint, if the tracking server has it.

    Args:
        uri: tracking server.
        directory: Hugging Face directory whose last part is `checkpoint`; its files are stored unchanged.
        name: registered model.
        experiment: experiment of the run that is made if the training run is not there.
        metrics: metrics to record with the version.
        alias: `candidate` or `champion`.
        measured: a section of the model card for each task that it was measured on.

    Returns:
        The version number.

    Raises:
        CheckpointError: the directory is not a complete checkpoint.
        ConfigError: the tracking server or its storage does not answer.
    """
    verify_checkpoint(directory)
    checkpoint = load_checkpoint(directory)
    if directory.name != CHECKPOINT:
        raise CheckpointError(f"checkpoint '{directory}': a registered directory must be called '{CHECKPOINT}'")
    lineage, identity = read_lineage(directory), checkpoint_id(directory)
    training_run = existing_run(uri, lineage.run_id)
    card = model_card(name, directory, identity, measured, source_is_training=training_run is not None)
    step = read_metadata(directory).get("step")
    with explained(uri):
        if training_run:
            run_id = training_run.info.run_id
        else:
            run_id = start_run(uri, experiment, f"register-{name}", {"checkpoint": str(directory)})
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        run = client.get_run(run_id)
        # `mlflow.pyfunc.log_model` would need an active run, and activating one that has ended reopens it.
        model = client.create_logged_model(run.info.experiment_id, "longclip", run_id, params=run.data.params)
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / CARD.name).write_text(card)
            Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                model_id=model.model_id,
                run_id=run_id,
                step=step if isinstance(step, int) else 0,
                python_model=str(PYFUNC_MODEL),
                artifacts={CHECKPOINT: str(directory), "card": str(Path(scratch) / CARD.name)},
                code_paths=[str(Path(longclip.__file__).parent)],
                pip_requirements=requirements(),
                signature=_signature(),
                input_example=_input_example(),
                metadata={"context_length": checkpoint.context_length, "checkpoint_id": identity},
            )
        log_metrics(uri, run_id, metrics, model.model_id)
        origin = {"checkpoint_id": identity, **asdict(lineage)}
        tags = {key: value for key, value in origin.items() if value} | {
            MANIFEST_TAG: file_sha256(directory / MANIFEST)
        }
        version = mlflow.register_model(f"models:/{model.model_id}", name, tags=tags)
        client.update_model_version(name, version.version, description(card))
        client.set_registered_model_alias(name, alias, version.version)
    if not training_run:
        end_run(uri, run_id, succeeded=True)
    return int(version.version)


def requirements() -> list[str]:
    """The packages that the model needs, pinned to the installed versions. A local label such as `+cpu` is left out,
    because package indexes do not have it."""
    return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in CORE]


def _signature() -> ModelSignature:
    """Output and parameters. A declared input would make MLflow drop columns, or refuse a list or a Series, before the
    model sees them; so the model checks its input itself."""
    vectors = Schema([ColSpec(Array(DataType.double))])
    return ModelSignature(outputs=vectors, params=ParamSchema([ParamSpec("truncate", DataType.boolean, False)]))


def _input_example() -> list[dict[str, Any]]:
    """A text and an image."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    return [{"text": "a photo of a dog that runs along a beach"}, {"image": image}]
