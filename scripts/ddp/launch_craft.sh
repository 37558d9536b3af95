#!/usr/bin/env bash
# Starts train_craft.py on every GPU of this machine; in one process where there is none.
#
# Edit MODEL, SFT_DATA and OUTPUT_DIR (or set them in the environment), then:
#   ./launch_craft.sh                                   train
#   ./launch_craft.sh --dry_run                         read the data, print what would be trained on, stop
#   ./launch_craft.sh --resume_from_checkpoint latest   go on after the last checkpoint
# What stands after the script's name goes to train_craft.py and counts more than what is set here (--sources there
# also puts LANGUAGES aside); its --help tells the flags. NPROC=2 sets the number of processes, CUDA_VISIBLE_DEVICES=0,1 the GPUs, PYTHON the interpreter.
#
# With accelerate instead of torchrun: accelerate launch --num_processes 4 train_craft.py FLAGS
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

MODEL="${MODEL:-meta-llama/Llama-3.2-1B-Instruct}" # hub id or directory
SFT_DATA="${SFT_DATA:-/path/to/train.jsonl}"       # columns messages, or prompt and completion, or text
OUTPUT_DIR="${OUTPUT_DIR:-outputs/craft}"

# Each source comes from the hub, or as NAME=PATH from files; leave the list empty for self_align.
SOURCES=(
    flores            # curated parallel sentences, about 1,000 a language; flores=PATH
    # nllb            # mined bitext, up to millions of pairs; nllb=PATH
    all-nli           # entailment pairs; all-nli=PATH
    quora-duplicates  # questions asked twice
    natural-questions # questions and answers
    # mine=pairs.jsonl # your own: columns text and text_tgt
)
LANGUAGES=(sin_Sinh urd_Arab yue_Hant) # FLORES codes, each paired with --pivot_language (eng_Latn)
PAIR_FLAGS=(
    --max_contrastive_samples 50000 # shares of sources and languages stay
    # --nllb_min_laser_score 1.25   # higher: cleaner and fewer
    # --hard_negatives true         # triplets and contradictions; not with flores and nllb
)

FLAGS=(
    --per_device_train_batch_size 4
    --gradient_accumulation_steps 4
    --learning_rate 2e-4
    --lr_scheduler_type cosine
    --num_train_epochs 1
    --max_length 512
    --logging_steps 10
    --save_steps 200
    --save_total_limit 3
    # --eval_data /path/to/held_out.jsonl # keep the checkpoint with the lowest loss on these rows

    # QLoRA
    --load_in_4bit true
    --lora_r 16
    --lora_alpha 32

    # The objective: --craft_preset NAME sets what is not given here
    --craft_alpha 0.6
    --craft_beta 0.5

    # Memory
    --craft_use_hidden_state_hook true
    --craft_use_gradcache true
    --craft_gradcache_chunk_size 4 # smaller: less memory
    --craft_learnable_temperature true
    --craft_projection_dim 256

    # Balance of the two losses
    --craft_gradient_balancing loss_scale
    --craft_loss_scale_momentum 0.99
    # --craft_gradient_balancing gradnorm # a stronger balance
    # --craft_gradnorm_alpha 1.5
)

if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$here/../../.venv/bin/python" ]] && PYTHON="$here/../../.venv/bin/python"
fi
if [[ -z "${NPROC:-}" ]]; then
    NPROC="$("$PYTHON" -c 'import torch; print(max(torch.cuda.device_count(), 1))')"
fi

command=(
    "$here/train_craft.py"
    --model_name_or_path "$MODEL"
    --sft_data "$SFT_DATA"
    --output_dir "$OUTPUT_DIR"
    "${FLAGS[@]}"
)
# Whether the command line has a flag: given NAME "$@"
given() {
    local name="$1" word
    shift
    for word in "$@"; do
        word="${word//-/_}" # a flag may be written with hyphens
        [[ "$word" == "__$name" || "$word" == "__$name="* ]] && return 0
    done
    return 1
}
# A flag that nothing would read is refused: self_align reads none of these, and only flores and nllb the languages.
if given sources "$@"; then
    command+=(${PAIR_FLAGS[@]+"${PAIR_FLAGS[@]}"})
elif ((${#SOURCES[@]})); then
    command+=(--sources "${SOURCES[@]}" ${PAIR_FLAGS[@]+"${PAIR_FLAGS[@]}"})
    if [[ " ${SOURCES[*]} " =~ " "(flores|nllb)(" "|=) ]] && ((${#LANGUAGES[@]})) && ! given language_pairs "$@"; then
        command+=(--languages "${LANGUAGES[@]}")
    fi
fi

if ((NPROC == 1)); then
    exec "$PYTHON" "${command[@]}" "$@"
fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" "${command[@]}" "$@"
