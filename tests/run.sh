#!/usr/bin/env bash
# Sets up .venv and runs the default test tier, files side by side; arguments go to pytest (bash tests/run.sh -m slow).
set -euo pipefail
ENVIRONMENT_EXTRAS=dev source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the workers share the cores
[ $# -gt 0 ] || set -- -m "not slow and not gpu" -n auto --maxprocesses 4 --dist loadfile
exec "$PYTHON" -m pytest "$@"
