#!/usr/bin/env bash
# MoReS over a base in 4 bits (nf4, double quantisation), for cards with little memory; the adapter loads on 16 bits
# too. Needs a LLaVA checkout as working folder; finetune_common.sh lists the environment variables.
#
#   GPU=24 DRY_RUN=1 BATCH=2 scripts/finetune_mores_4bit.sh
#   BATCH=2 scripts/finetune_mores_4bit.sh
set -euo pipefail
BATCH=${BATCH:-4}
source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
PROJECTOR=${PROJECTOR-./checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin}
# Not with ZeRO-3: quantised weights cannot be sharded.
finetune mores-4bit \
  --bits 4 --tuning_mode mores --mores_rank 1 --mores_tokens 1% --mores_dropout 0.05 \
  --learning_rate 2e-4 --mm_projector_lr 2e-5 --num_train_epochs 1 "$@"
