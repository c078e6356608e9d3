#!/usr/bin/env bash
# Megatron-Core to Hugging Face, without Megatron and without a GPU; format and layout are read from the checkpoint:
#   bash mcore2hf.sh MCORE_FOLDER HF_FOLDER [HF_CONFIG_FOLDER [flags of finebridge convert]]
# HF_CONFIG_FOLDER has config.json and the tokenizer; left out, they are taken from MCORE_FOLDER or made from its args.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
load="$1" save="$2"
shift 2
config=()
if [ $# -gt 0 ] && [[ "$1" != --* ]]; then config=(--hf_config "$1"); shift; fi
exec "$PYTHON" -P -m finebridge.finetune.cli convert --from mcore --to hf --load "$load" --save "$save" "${config[@]}" "$@"
