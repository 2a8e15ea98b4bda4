#!/usr/bin/env bash
# MoReS tuned for one task, over a finished LLaVA-1.5 with a frozen projector: the adapter is a megabyte. Needs a LLaVA
# checkout as working folder; finetune_common.sh lists the environment variables.
#
#   DATA=./my-task.json IMAGES=./my-images OUTPUT=./checkpoints/my-task scripts/finetune_task_mores.sh
#   TASK=iconqa_blank SOURCE=/data/iconqa SAMPLES=1000 scripts/finetune_task_mores.sh    the paper's way
#
# Besides, in place of DATA and IMAGES:
#   TASK         a benchmark that lies on disk (docs/benchmarks-data.md): its training data is made once, if it is missing
#   SOURCE       its folder, in the official layout
#   SAMPLES      how many questions to draw: 1000, 5000 or 10000 in the paper (all)
#   PREPARED     where the data goes (./playground/data/tasks)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"
MODEL=${MODEL:-liuhaotian/llava-v1.5-$SIZE}
name=task-mores
if [ -n "${TASK:-}" ]; then
  [ -z "${DATA:-}${IMAGES:-}" ] || die "TASK $TASK brings its own data; leave out TASK, or DATA and IMAGES"
  [ -n "${SOURCE:-}" ] || die "TASK is $TASK; give its folder as SOURCE"
  PREPARED=${PREPARED:-./playground/data/tasks}
  DATA=$PREPARED/${TASK}_train${SAMPLES:+_$SAMPLES}.json
  IMAGES=$PREPARED/images
  name=$TASK-mores
  if [ ! -f "$DATA" ] && [ "${DRY_RUN:-0}" != 1 ]; then
    llava-steering prepare "$TASK" --source "$SOURCE" --output "$PREPARED" --split train ${SAMPLES:+--samples "$SAMPLES"}
  fi
fi
# The rate and the ten epochs are those of the authors' scripts/exp/exp_3rd_stage_finetune, over another base, whose
# projector they train too (here: --freeze_mm_mlp_adapter False).
finetune "$name" \
  --tuning_mode mores --mores_rank 1 --mores_tokens 1% --mores_dropout 0.05 --freeze_mm_mlp_adapter True \
  --learning_rate 2e-4 --num_train_epochs 10 "$@"
