#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes:
#
#     bash scripts/gpu_check.sh OUT [--device cpu] [--data-dir FOLDER]
#
# Results land in the folder OUT as they come; OUT/summary.md ends them. It takes Python with torch
# and Triton and no network, and the project need not be installed. bench/gpu_check.py has the parts.
set -u

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=$(command -v python3 || command -v python) || {
        echo "gpu_check.sh: no python3 here; PYTHON=... names one" >&2
        exit 2
    }
fi
exec "$python" "$root/bench/gpu_check.py" "$@"
