#!/usr/bin/env bash
# MixLoRA on instruction data of many tasks (the paper's is Vision-Flan: give it as DATA and IMAGES), over Vicuna with
# the projector of stage 1. Needs a LLaVA checkout as working folder; finetune_common.sh lists the environment variables.
#
#   DATA=./playground/data/vision_flan.json scripts/finetune_mixlora.sh
#   DRY_RUN=1 GPU=A100-80GB SIZE=13b scripts/finetune_mixlora.sh
#
# The authors' own script has LLaVA-1's base: images of 224 pixels, and a projector of one layer.
#
#   MODEL=lmsys/vicuna-7b-v1.3 TOWER=openai/clip-vit-large-patch14 PROJECTOR=... scripts/finetune_mixlora.sh \
#     --mm_projector_type linear --image_aspect_ratio square
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
PROJECTOR=${PROJECTOR-./checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin}
# Conditional Mixture of LoRA (arXiv 2402.15896). Rate, epochs and length are those of the authors' finetune_mixlora.sh.
finetune mixlora \
  --tuning_mode mixlora --mixlora_factors 16 --mixlora_rank 4 --mixlora_conditional True --mixlora_dropout 0.05 \
  --model_max_length 1792 --learning_rate 4e-5 --num_train_epochs 3 "$@"
