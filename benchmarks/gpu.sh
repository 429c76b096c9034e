#!/usr/bin/env bash
# Measures training, loading, saving, sampling and equal bits on a GPU, unattended and without a network, in nine minutes:
#
#     benchmarks/gpu.sh [--output gpu.json] [--quick] [PART ...]
#
# It needs a CUDA image of PyTorch and a copy of this checkout. It names the packages that the image lacks. Where there is
# a network and the same Python, pip brings them: pip install --target .gpu-packages NAME ...
# PYTHON=python3.12 names the Python, and BENCH_DEVICE=cpu leaves the GPUs alone.
set -euo pipefail
cd "$(dirname "$0")/.."
# The program asks for its own version, which an installation would know.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
mkdir -p ".gpu-packages/ddpm_job-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: ddpm-job\nVersion: %s\n' "$version" >".gpu-packages/ddpm_job-$version.dist-info/METADATA"
export PYTHONPATH="$PWD:$PWD/.gpu-packages${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ "${BENCH_DEVICE:-cuda}" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=
fi
"${PYTHON:-python3}" -m benchmarks.missing
exec "${PYTHON:-python3}" -m benchmarks --gpu --output gpu.json "$@"
