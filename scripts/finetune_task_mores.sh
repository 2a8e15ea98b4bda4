#!/usr/bin/env bash
# MoReS on your own task, over a finished LLaVA-1.5 with a frozen projector: the adapter is a megabyte. Needs a LLaVA
# checkout as working folder; finetune_common.sh lists the environment variables.
#
#   DATA=./my-task.json IMAGES=./my-images OUTPUT=./checkpoints/my-task scripts/finetune_task_mores.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.5-$SIZE}
finetune task-mores \
  --tuning_mode mores --mores_rank 1 --mores_tokens 1% --mores_dropout 0.05 --freeze_mm_mlp_adapter True \
  --learning_rate 2e-4 --num_train_epochs 1 "$@"
