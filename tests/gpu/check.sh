#!/usr/bin/env bash
# Numerics and speed of the training step on one NVIDIA GPU (H100, H200), in at most six minutes:
#
#     bash tests/gpu/check.sh [OUT.json]            # on a GPU; writes gpu-check.json
#     bash tests/gpu/check.sh --small [OUT.json]    # the same code with a tiny model on a CPU, in a minute
#
# Needs torch (2.11 or newer), transformers (5.17 or newer), safetensors, numpy and Pillow. No Ray, no network.
# PYTHON names the interpreter. Exits with 0 if all numerics are within their limits, 1 if not, 2 without a GPU.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD:$PWD/tests/bench:$PWD/tests/gpu" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Fragments of freed memory would otherwise decide which batch fits.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python3}" tests/gpu/check.py "$@"
