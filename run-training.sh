#!/usr/bin/env bash
# The main job, from a PyTorch checkpoint to a tested adapter. Edit the block below, or give any of
# its variables in the environment: ITERS=100 ./run-training.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" > /dev/null && pwd)

PYTHON=${PYTHON:-python3}
TORCH_PATH=${TORCH_PATH:-$here/base-model}  # the checkpoint: a Llama, Mistral or Qwen
CONVERT_FLAGS=${CONVERT_FLAGS:-}            # -q: 4 bits a weight, so that training is QLoRA
MODEL=${MODEL:-${TORCH_PATH%/}-mlx${CONVERT_FLAGS// /}}  # the converted model, made if not there
PACKAGES=${PACKAGES:-mlx}                   # whose docstrings to learn
FORMAT=${FORMAT:-text}                      # what a record is: text, completion or chat
DATA=${DATA:-$here/${PACKAGES// /-}-doc-data$([ "$FORMAT" = text ] || echo "-$FORMAT")}  # train,
                                            # valid and test.jsonl, made if not there
CHAT_TEMPLATE=${CHAT_TEMPLATE:-chatml}      # of chats, where the model has none of its own
ADAPTER=${ADAPTER:-$here/adapters.npz}      # the result

# For a small model and a few minutes on two cores; for 7 B, rather lora.py's own defaults, and 1e-4,
# or 3e-4 with all projections. Figures: tests/benchmarks/README.md, "Settings".
LORA_LAYERS=${LORA_LAYERS:-30}              # all: a small model has little to spare in any
LORA_PROJECTIONS=${LORA_PROJECTIONS:-w1 w2 w3}  # the feed-forward ones learn most for their time
BATCH_SIZE=${BATCH_SIZE:-2}                 # one text a core; more steps teach more than larger ones
ITERS=${ITERS:-250}                         # each text once
MAX_SEQ_LENGTH=${MAX_SEQ_LENGTH:-112}       # tokens: what a text begins with is worth the time most
LEARNING_RATE=${LEARNING_RATE:-5e-4}        # a small model bears fifty times lora.py's 1e-5
VAL_BATCHES=${VAL_BATCHES:-5}               # a look on the way; the test is on all of its set
EVAL_EVERY=${EVAL_EVERY:-84}                # steps between two looks

if [ "$TORCH_PATH" -ef "$here/base-model" ]; then
    "$PYTHON" "$here/base-model/make.py"
fi
if [ ! -f "$MODEL/params.json" ]; then
    # shellcheck disable=SC2086  # flags are words
    "$PYTHON" "$here/convert.py" --torch-path "$TORCH_PATH" --mlx-path "$MODEL" $CONVERT_FLAGS
fi
if [ ! -f "$DATA/train.jsonl" ]; then
    # shellcheck disable=SC2086  # package names are words
    "$PYTHON" "$here/cwk_create_dataset.py" $PACKAGES --data-folder "$DATA" --format "$FORMAT"
fi

data_flags=""
if [ "$FORMAT" != text ]; then
    data_flags="--mask-prompt"  # what is learnt are the answers
fi
if [ "$FORMAT" = chat ] && [ ! -f "$MODEL/chat_template.jinja" ]; then
    data_flags="$data_flags --chat-template $CHAT_TEMPLATE"
fi
# shellcheck disable=SC2086  # flags are words
lora() { "$PYTHON" "$here/lora.py" --model "$MODEL" --data "$DATA" $data_flags "$@"; }

echo "== The base model"
lora --test --test-batches -1 --no-adapter

echo "== Training"
# shellcheck disable=SC2086  # names of projections are words
lora --train --adapter-file "$ADAPTER" --lora-layers "$LORA_LAYERS" \
    --lora-projections $LORA_PROJECTIONS --batch-size "$BATCH_SIZE" --iters "$ITERS" \
    --max-seq-length "$MAX_SEQ_LENGTH" --learning-rate "$LEARNING_RATE" --val-batches "$VAL_BATCHES" \
    --steps-per-eval "$EVAL_EVERY"

echo "== The adapted model"
lora --test --test-batches -1 --adapter-file "$ADAPTER"
