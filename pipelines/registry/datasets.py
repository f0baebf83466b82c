"""Data sets as inputs of MLflow runs."""

import json

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from pipelines.common.data_digest import DataDigest
from pipelines.common.parquet_set import ParquetSet
from pipelines.common.storage import is_local
from pipelines.registry.server import explained


def log_data(uri: str, run_id: str, context: str, data: ParquetSet, digest: DataDigest) -> None:
    """Log a data set as an input of a run; a second time changes nothing.

    Args:
        uri: tracking server.
        run_id: run.
        context: what the run uses it for: `training` or `validation`.
        data: the set.
        digest: its identity.

    Raises:
        ConfigError: the tracking server does not take it.
    """
    columns = [{"name": column.name, "type": str(column.type), "required": True} for column in data.schema]
    logged = Dataset(
        name=digest.name,
        digest=digest.digest,
        source_type="local" if is_local(data.root) else data.root.protocol,
        source=json.dumps({"uri": str(data.root)}),
        schema=json.dumps({"mlflow_colspec": columns}),
        profile=json.dumps({"rows": data.rows, "files": len(data.files), "digest_of": digest.of}),
    )
    with explained(uri):
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, context)]
        MlflowClient(uri).log_inputs(run_id, [DatasetInput(logged, tags)])
