#!/usr/bin/env bash
# Phi-2, SigLIP and an MLP of two layers: 729 tokens an image. common.sh beside it lists the environment variables.
#
#   scripts/combinations/phi2_siglip_mlp.sh pretrain && scripts/combinations/phi2_siglip_mlp.sh finetune
#   DRY_RUN=1 GPU=A100-80GB scripts/combinations/phi2_siglip_mlp.sh finetune
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
MODEL=${MODEL:-microsoft/phi-2}
TOWER=${TOWER:-siglip:google/siglip-so400m-patch14-384}
CONNECTOR=${CONNECTOR:-mlp2x_gelu}
combination phi2-siglip-mlp phi 1e-3 "$@"
