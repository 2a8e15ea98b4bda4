# Shared part of the finetune_*.sh scripts, which source it. Run them in a LLaVA checkout, with ./playground/data,
# ./checkpoints and ./scripts/zero*.json as in upstream's documentation.
#
# Environment variables, with their defaults:
#   SIZE         7b or 13b (7b)
#   MODEL        the base: folder or hub id (by SIZE)
#   DATA         conversations in LLaVA's JSON (./playground/data/llava_v1_5_mix665k.json)
#   IMAGES       folder of the images (./playground/data)
#   TOWER        vision tower (openai/clip-vit-large-patch14-336)
#   PROJECTOR    the stage-1 projector, for a MODEL without one (./checkpoints/llava-v1.5-$SIZE-pretrain/mm_projector.bin)
#   OUTPUT       folder of the adapter (./checkpoints/llava-v1.5-$SIZE-<what is trained>)
#   GPUS         number of GPUs (those in CUDA_VISIBLE_DEVICES, else all that nvidia-smi lists)
#   BATCH        samples per GPU (16)
#   GLOBAL_BATCH samples per optimizer step; GPUS times BATCH must divide it (128)
#   ZERO         DeepSpeed's JSON; empty: without DeepSpeed (./scripts/zero2.json: the frozen base has no optimizer states)
#   REPORT_TO    none, wandb or tensorboard (none)
#   LAUNCHER     command that starts upstream's training (deepspeed ... llava_steering_plugin.launch llava.train.train_mem)
#   DRY_RUN      1: check the flags and print the plan and its memory; train nothing
#   GPU          for DRY_RUN: the card that it has to fit, a name (A100-80GB) or GiB
#
# Arguments are added to the flags of the training and win over those here: scripts/finetune_mores.sh --mores_rank 4

die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 2; }

SIZE=${SIZE:-7b}
case $SIZE in 7b | 13b) ;; *) die "SIZE is $SIZE; it must be 7b or 13b" ;; esac
IFS=, read -ra CARDS <<<"${CUDA_VISIBLE_DEVICES:-}"
if [ "${#CARDS[@]}" -gt 0 ]; then
  GPUS=${GPUS:-${#CARDS[@]}}
fi
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | grep -c . || true)}
[ "${GPUS:-0}" -ge 1 ] || GPUS=1
BATCH=${BATCH:-16}
GLOBAL_BATCH=${GLOBAL_BATCH:-128}
[ $((GLOBAL_BATCH % (GPUS * BATCH))) -eq 0 ] ||
  die "GLOBAL_BATCH $GLOBAL_BATCH cannot be cut into batches of $BATCH on $GPUS GPU(s); set BATCH or GLOBAL_BATCH"
ZERO=${ZERO-./scripts/zero2.json}

# Set `launcher` to DeepSpeed's on GPUS cards: the first of CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.
choose_launcher() {
  local which=(--num_gpus "$GPUS") module=(--module llava_steering_plugin.launch llava.train.train_mem)
  if [ "${#CARDS[@]}" -gt 0 ]; then
    case $CUDA_VISIBLE_DEVICES in
      *[!0-9,]*) die "deepspeed takes cards by number, and CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES; give numbers, or" \
        "LAUNCHER='torchrun --nproc_per_node $GPUS -m ${module[*]:1}'" ;;
    esac
    [ "$GPUS" -le "${#CARDS[@]}" ] || die "GPUS is $GPUS and CUDA_VISIBLE_DEVICES is $CUDA_VISIBLE_DEVICES; change one of them"
    which=(--include "localhost:$(IFS=,; echo "${CARDS[*]:0:GPUS}")")
  fi
  launcher=(deepspeed "${which[@]}" "${module[@]}")
}

# finetune NAME FLAGS...: train with upstream's flags, those of NAME's method, and the caller's arguments.
finetune() {
  local name=$1
  shift
  local flags=(
    --model_name_or_path "$MODEL"
    --version v1
    --data_path "${DATA:-./playground/data/llava_v1_5_mix665k.json}"
    --image_folder "${IMAGES:-./playground/data}"
    --vision_tower "${TOWER:-openai/clip-vit-large-patch14-336}"
    --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2
    --mm_use_im_start_end False
    --mm_use_im_patch_token False
    --image_aspect_ratio pad
    --group_by_modality_length True
    --bf16 True
    --tf32 True
    --output_dir "${OUTPUT:-./checkpoints/llava-v1.5-$SIZE-$name}"
    --per_device_train_batch_size "$BATCH"
    --gradient_accumulation_steps $((GLOBAL_BATCH / (GPUS * BATCH)))
    --evaluation_strategy no
    --save_strategy steps
    --save_steps 500
    --save_total_limit 2
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type cosine
    --logging_steps 1
    --model_max_length 2048
    --gradient_checkpointing True
    --dataloader_num_workers 4
    --lazy_preprocess True
    --report_to "${REPORT_TO:-none}"
  )
  [ -z "$ZERO" ] || flags+=(--deepspeed "$ZERO")
  [ -z "${PROJECTOR:-}" ] || flags+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
  flags+=("$@")
  if [ "${DRY_RUN:-0}" = 1 ]; then
    exec llava-steering plan --gpus "$GPUS" ${GPU:+--gpu "$GPU"} "${flags[@]}"
  fi
  local launcher
  # shellcheck disable=SC2206 # a command of several words
  if [ -n "${LAUNCHER:-}" ]; then launcher=($LAUNCHER); else choose_launcher; fi
  exec "${launcher[@]}" "${flags[@]}"
}
