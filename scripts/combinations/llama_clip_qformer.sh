#!/usr/bin/env bash
# Llama (Vicuna), CLIP and a Q-Former: 32 tokens an image. common.sh beside it lists the environment variables, and SIZE
# is 7b or 13b.
#
#   scripts/combinations/llama_clip_qformer.sh pretrain && scripts/combinations/llama_clip_qformer.sh finetune
#   SIZE=13b DRY_RUN=1 GPU=A100-80GB scripts/combinations/llama_clip_qformer.sh finetune
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-lmsys/vicuna-$SIZE-v1.5}
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}
CONNECTOR=${CONNECTOR:-qformer}
# 1e-4, BLIP-2's rate (arXiv 2301.12597): LLaVA's 1e-3 is for an MLP, and this is a transformer of twelve layers.
combination "llama-$SIZE-clip-qformer" v1 1e-4 "$@"
