#!/usr/bin/env bash
# Sets up .venv and runs the default test tier; arguments go to pytest (bash tests/run.sh -m slow).
set -euo pipefail
ENVIRONMENT_EXTRAS=dev source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
cd "$root"
[ $# -gt 0 ] || set -- -m "not slow and not gpu"
exec "$PYTHON" -m pytest "$@"
