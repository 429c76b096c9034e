#!/usr/bin/env bash
# Measures training, loading, saving, sampling and equal bits on a GPU, unattended and without a network, in nine minutes:
#
#     benchmarks/gpu.sh [--output gpu.json] [--tiny] [PART ...]
#
# It needs a CUDA image of PyTorch and a copy of this checkout. Packages that the image lacks lie in .gpu-packages; where
# there is a network and the same Python: pip install --no-deps --target .gpu-packages NAME ...
# PYTHON=python3.12 names the Python, and BENCH_DEVICE=cpu leaves the GPUs alone.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ "${BENCH_DEVICE:-cuda}" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
fi
exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
