#!/usr/bin/env bash
# Pretraining: bash pretrain.sh --config_name CONFIG --tokenizer_name_or_path TOKENIZER --train_data_file text.jsonl ...
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
exec "$PYTHON" -P -m finebridge.finetune.cli pretrain "$@"
