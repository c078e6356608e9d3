#!/usr/bin/env bash
# Fine-tune. Without arguments: the built-in example. With arguments: finebridge ARGUMENTS, for example
#   bash finetune.sh --model_name_or_path MODEL --train_data_file data.jsonl --deepspeed ds_zero2_no_offload --bf16
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[ $# -gt 0 ] || set -- example
exec "$PYTHON" -P -m finebridge.finetune.cli "$@"
