#!/usr/bin/env bash
# The rows that a mixture of sources takes, by ratio and number, into a dated folder:
#   bash sample_with_ratio.sh mix.yaml --output DIR [--deduplicate ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
exec "$PYTHON" -P -m finebridge.finetune.cli data sample "$@"
