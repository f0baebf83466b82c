"""Run as `python tests/support/carried_code.py MODEL`: a registered model where only its own code can be imported.

It simulates an environment made from the model's requirements: this repository is not on the path, and the packages of
the extras are not installed. JSON requests for MLflow's server come from standard input, one a line; the status and
answer of each go to standard output.
"""

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

HIDDEN = frozenset("ray pipelines serving pyarrow upath s3fs faiss lance imagehash prometheus_client".split())  # noqa: SIM905


class WithoutExtras(PathFinder):
    """Finds modules as Python does, but none of the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


def main(model_directory: str) -> None:
    """Load the model and answer the requests."""
    import mlflow
    from mlflow.pyfunc.scoring_server import init
    from starlette.testclient import TestClient

    model = mlflow.pyfunc.load_model(model_directory)
    import longclip

    assert Path(longclip.__file__).is_relative_to(model_directory), longclip.__file__
    assert not HIDDEN & sys.modules.keys()
    client = TestClient(init(model), raise_server_exceptions=False)
    for line in sys.stdin:
        response = client.post("/invocations", content=line, headers={"Content-Type": "application/json"})
        print(json.dumps([response.status_code, response.json()]))


if __name__ == "__main__":
    repository = Path(__file__).resolve().parents[2]
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() not in (repository, Path(__file__).parent)]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
    main(sys.argv[1])
