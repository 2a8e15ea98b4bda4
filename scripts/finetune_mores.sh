#!/usr/bin/env bash
# MoReS on LLaVA-1.5's instruction data (stage 2), over Vicuna with the projector of stage 1. Needs a LLaVA checkout as
# working folder; finetune_common.sh lists the environment variables.
#
#   scripts/finetune_mores.sh                      7B
#   SIZE=13b scripts/finetune_mores.sh --mores_rank 4
#   DRY_RUN=1 GPU=A100-80GB scripts/finetune_mores.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
PROJECTOR=${PROJECTOR-./checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin}
# LLaVA Steering (arXiv 2412.12359). Rate, epochs and dropout are those of the authors' exp_2nd_stage_finetune, and the
# projector is trained, as it is there.
finetune mores \
  --tuning_mode mores --mores_rank 1 --mores_tokens 1% --mores_dropout 0.05 \
  --learning_rate 2e-4 --mm_projector_lr 2e-5 --num_train_epochs 1 "$@"
