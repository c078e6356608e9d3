#!/usr/bin/env bash
# Merge a LoRA adapter into its base:
#   bash merge_lora_weight.sh --base_model_path B --adapter_model_path A --output_path O --save_dtype {bf16,fp16,fp32}
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
exec "$PYTHON" -P -m finebridge.finetune.cli merge "$@"
