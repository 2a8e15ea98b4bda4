#!/usr/bin/env bash
# Qwen2.5 and a mixture of features: CLIP's and DINOv2's tokens in turns, 1152 an image, each through an MLP of its own.
# common.sh beside it lists the environment variables.
#
#   scripts/combinations/qwen2_5_mof.sh pretrain && scripts/combinations/qwen2_5_mof.sh finetune
#   DRY_RUN=1 GPU=A100-80GB scripts/combinations/qwen2_5_mof.sh finetune
set -euo pipefail
BATCH=${BATCH:-8} # rows of 3072 and 151,936 words: 16 do not fit on 80 GB
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TOWER=${TOWER:-mof:openai/clip-vit-large-patch14-336+facebook/dinov2-large}
CONNECTOR=${CONNECTOR:-mof-mlp}
# Images take twice the usual places, so rows may be longer.
combination qwen2_5-mof qwen2_5 1e-3 --model_max_length 3072 "$@"
