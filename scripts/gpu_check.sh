#!/usr/bin/env bash
# Check and measure this project on the GPU at hand, in ten minutes, from the source tree; nothing needs to be installed but
# the dependencies:
#   scripts/gpu_check.sh [--out FOLDER] [--device cuda|cpu] [--small] [--seconds 570]
# It prints one Markdown table and ends with status 0 if every part ran and passed. docs/performance.md says more.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v python || command -v python3) || { echo "error: no python on PATH" >&2; exit 1; }
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m scripts.gpu_check "$@"
