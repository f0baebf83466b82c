"""Run as `python tests/support/no_ray.py SCRIPT ARGUMENTS`: Python without the packages that only extras install.

It simulates an environment in which `pip install .` installed only the library.
"""

import runpy
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(
    "ray mlflow fastapi starlette pydantic httpx aiohttp uvicorn pyarrow pandas upath s3fs botocore boto3 matplotlib"  # noqa: SIM905
    " prometheus_client imagehash faiss lance onnx onnx_ir onnxruntime onnxscript diffusers sentence_transformers"
    " sklearn scipy pytest".split()
)


class WithoutExtras(PathFinder):
    """Finds modules as Python does, but none of the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        return None if fullname.partition(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


if __name__ == "__main__":
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
