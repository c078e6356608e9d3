#!/usr/bin/env bash
# Supervised fine-tuning: bash train.sh --model_name_or_path MODEL --train_data_file data.jsonl --output_dir out ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
exec "$PYTHON" -P -m finebridge.finetune.cli sft "$@"
