# Shared part of the scripts beside it, which source it: both stages of a LLaVA of other parts. Run them in a LLaVA
# checkout, with LLaVA's data where its documentation puts it.
#
#   scripts/combinations/NAME.sh pretrain [FLAGS]    stage 1: the connector alone, on captions, by LLaVA's own training
#   scripts/combinations/NAME.sh finetune [FLAGS]    stage 2: MoReS and the connector, on instructions
#
# Environment variables: those of scripts/finetune_common.sh. Their defaults here:
#   MODEL, TOWER        those that the script is called by
#   CONNECTOR           the same, with its settings: docs/components.md
#   DATA, IMAGES        pretrain: ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json, .../images
#   OUTPUT              ./checkpoints/NAME-pretrain; ./checkpoints/NAME-mores
#   PROJECTOR           finetune: ./checkpoints/NAME-pretrain/mm_projector.bin
#   BATCH, GLOBAL_BATCH pretrain: 16, 256
# With DRY_RUN=1, a plan of stage 1 counts the same weights as `--tuning_mode projector`, since a plan needs a mode.

STAGE=${1:-}
case $STAGE in
  pretrain | finetune) shift ;;
  *)
    printf '%s: give the stage, pretrain or finetune%s\n' "$(basename "$0")" "${STAGE:+; it is $STAGE}" >&2
    exit 2
    ;;
esac
if [ "$STAGE" = pretrain ]; then
  BATCH=${BATCH:-16}
  GLOBAL_BATCH=${GLOBAL_BATCH:-256}
fi
source "$(dirname "${BASH_SOURCE[0]}")/../finetune_common.sh"

# combination NAME VERSION RATE [FLAGS...]: train MODEL, TOWER and CONNECTOR; VERSION is stage 2's template, and RATE the
# connector's in stage 1.
combination() {
  local name=$1 version=$2 rate=$3
  shift 3
  # Later flags win over those that finetune has for LLaVA-1.5.
  local parts=(--mm_projector_type "$CONNECTOR")
  if [ "$STAGE" = pretrain ]; then
    DATA=${DATA:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
    IMAGES=${IMAGES:-./playground/data/LLaVA-Pretrain/images}
    OUTPUT=${OUTPUT:-./checkpoints/$name-pretrain}
    local trained=(--tune_mm_mlp_adapter True)
    [ "${DRY_RUN:-0}" != 1 ] || trained=(--tuning_mode projector)
    # LLaVA cannot resume stage 1: its checkpoints hold the connector alone.
    finetune pretrain "${parts[@]}" --version plain "${trained[@]}" --image_aspect_ratio square \
      --group_by_modality_length False --save_strategy no --learning_rate "$rate" --num_train_epochs 1 "$@"
  else
    OUTPUT=${OUTPUT:-./checkpoints/$name-mores}
    PROJECTOR=${PROJECTOR-./checkpoints/$name-pretrain/mm_projector.bin}
    # As scripts/finetune_mores.sh.
    finetune mores "${parts[@]}" --version "$version" \
      --tuning_mode mores --mores_rank 1 --mores_tokens 1% --mores_dropout 0.05 \
      --learning_rate 2e-4 --mm_projector_lr 2e-5 --num_train_epochs 1 "$@"
  fi
}
