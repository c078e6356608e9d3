#!/usr/bin/env bash
# Hugging Face to Megatron-Core, without Megatron and without a GPU:
#   bash hf2mcore.sh HF_FOLDER MCORE_FOLDER [TP [PP [flags of finebridge convert]]]
# TP and PP given: files for that layout (format torch); left out: one torch_dist checkpoint for every layout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../finetune/environment.sh"
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
load="$1" save="$2"
shift 2
layout=()
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then layout=(--ckpt_format torch --tp "$1"); shift; fi
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then layout+=(--pp "$1"); shift; fi
exec "$PYTHON" -P -m finebridge.finetune.cli convert --from hf --to mcore --load "$load" --save "$save" "${layout[@]}" "$@"
