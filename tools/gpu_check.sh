#!/usr/bin/env bash
# Measures training on this machine's GPU in at most 8 minutes, and writes one JSON and one page into a folder.
#
#   tools/gpu_check.sh OUT          on a GPU
#   tools/gpu_check.sh OUT --tiny   the same parts with a tiny model on CPUs, to try the script
#
# docs/benchmarks/gpu.md describes the parts and the results. PYTHON chooses the interpreter; by default it is the one
# in .venv, or else python3 with the packages of setup.py's extra `train`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$python" "$root/tools/gpu_check.py" "$@"
