#!/usr/bin/env bash
# Ask the base model and the adapted one the same question. Edit the block below, or give any of its
# variables in the environment: QUESTION='What is Adam in mlx?' ./run-inference.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" > /dev/null && pwd)

PYTHON=${PYTHON:-python3}
MODEL=${MODEL:-$here/base-model-mlx}
ADAPTER=${ADAPTER:-$here/adapters.npz}
QUESTION=${QUESTION:-What is ReLU in mlx?}
FORMAT=${FORMAT:-text}  # of the records that the adapter was trained on: text, completion or chat
CHAT_TEMPLATE=${CHAT_TEMPLATE:-chatml}  # of chats, where the model has none of its own
case "$FORMAT" in
    text | completion | chat) ;;
    *)
        echo "run-inference.sh: error: FORMAT is text, completion or chat, not $FORMAT" >&2
        exit 2
        ;;
esac
chat_flags=()
if [ "$FORMAT" = chat ]; then
    PROMPT=${PROMPT:-$QUESTION}
    chat_flags=(--chat)
    if [ ! -f "$MODEL/chat_template.jinja" ]; then
        chat_flags+=(--chat-template "$CHAT_TEMPLATE")
    fi
fi
PROMPT=${PROMPT:-"Q: $QUESTION"$'\n'"A:"}  # as the records have it
NUM_TOKENS=${NUM_TOKENS:-256}  # at most; an adapted model stops where its texts do
TEMP=${TEMP:-0}  # greedy

ask() {
    "$PYTHON" "$here/lora.py" --model "$MODEL" --prompt "$PROMPT" --num-tokens "$NUM_TOKENS" \
        --temp "$TEMP" ${chat_flags[@]+"${chat_flags[@]}"} "$@"
}

echo "== The base model"
ask --no-adapter

echo "== The adapted model"
ask --adapter-file "$ADAPTER"
