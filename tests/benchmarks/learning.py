"""What a model knows of a data set's answers before and after training.

    python tests/benchmarks/learning.py --adapters adapters.npz
    python tests/benchmarks/learning.py --adapters adapters.npz long.npz --questions 100 --show 3

Asks the questions of train.jsonl and test.jsonl, greedy, and counts the answers that begin with the
right dotted name, whose first sentence is the right one, and that end by themselves. The perplexity
is that of the same texts. `--show` prints so many answers of each file, as they came.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402  from the repository's root
from models import Model  # noqa: E402
from parts import device  # noqa: E402
from parts.batch_generation import MAX_ROWS, AnswerRow  # noqa: E402
from parts.continuous_batching import generate_rows  # noqa: E402


SPLITS = ("train", "test")


def read_records(path: Path, n: int) -> list[tuple[str, str]]:
    """Prompts and right answers of `n` records of a file, evenly spread over it; -1 takes all."""
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    if 0 < n < len(texts):
        texts = [texts[i * len(texts) // n] for i in range(n)]
    return [
        (f"{question}\nA:", answer) for question, _, answer in (t.partition("\nA: ") for t in texts)
    ]


def perplexity(model: Model, tokenizer: lora.Tokenizer, records: list[tuple[str, str]]) -> float:
    """The perplexity of the records' whole texts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        texts = (json.dumps({"text": f"{prompt} {right}"}) for prompt, right in records)
        path.write_text("\n".join(texts), "utf-8")
        return math.exp(lora.evaluate(model, lora.Dataset(path), lora.loss, tokenizer, 4, -1))


def first_sentence(answer: str) -> str:
    """The first sentence after the dotted name, and after the signature where there is one."""
    name, _, text = answer.strip().partition(" ")
    paragraphs = re.split(r"\n\s*\n", text)
    if len(paragraphs) > 1 and paragraphs[0].startswith(f"{name.rpartition('.')[2]}("):
        del paragraphs[0]
    return " ".join(re.split(r"(?<=\.)\s", paragraphs[0])[0].split())


def answer(
    model: Model, tokenizer: lora.Tokenizer, prompts: list[str], n_tokens: int
) -> list[tuple[str, bool]]:
    """What the model says after each prompt, greedy, and whether it ended by itself."""
    rows = [
        AnswerRow(tokenizer.encode(prompt), tokenizer, n_tokens, tokenizer.eos_ids)
        for prompt in prompts
    ]
    answers = generate_rows(model, rows, MAX_ROWS, vocab_size=tokenizer.vocab_size)
    for _ in tqdm(answers, "Asking", len(rows), leave=False, disable=None):
        pass
    return [(row.text(), row.reason == "stop") for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "base-model-mlx"))
    parser.add_argument("--data", default=str(ROOT / "mlx-doc-data"))
    parser.add_argument("--adapters", nargs="*", default=[])
    parser.add_argument("--no-base", action="store_true", help="ask the adapted models alone")
    parser.add_argument("--questions", type=int, default=-1, help="of each file, -1: all")
    parser.add_argument("--num-tokens", type=int, default=160)
    parser.add_argument("--show", type=int, default=0)
    args = parser.parse_args()

    print(
        "| model | questions | right name | right first sentence | ended by itself | perplexity |"
    )
    print("|---|---|---|---|---|---|")
    shown = []
    for adapter in args.adapters if args.no_base else (None, *args.adapters):
        model, tokenizer = lora.load_model(args.model)
        if adapter:
            lora.load_adapter(model, adapter)
        for split in SPLITS:
            path = Path(args.data) / f"{split}.jsonl"
            records = read_records(path, args.questions)
            answers = answer(model, tokenizer, [prompt for prompt, _ in records], args.num_tokens)
            names = sum(
                a.split(maxsplit=1)[:1] == right.split(maxsplit=1)[:1]
                for (a, _), (_, right) in zip(answers, records, strict=True)
            )
            sentences = sum(
                first_sentence(a) == first_sentence(right)
                for (a, _), (_, right) in zip(answers, records, strict=True)
            )
            ended = sum(ends for _, ends in answers)
            value = perplexity(model, tokenizer, records)
            device.open_streams(1)
            shares = " | ".join(f"{n / len(records):.2f}" for n in (names, sentences, ended))
            name = Path(adapter).name if adapter else "base"
            print(
                f"| {name} | {len(records)} of {path.name} | {shares} | {value:.2f} |",
                flush=True,
            )
            for (prompt, _), (text, _) in list(zip(records, answers, strict=True))[: args.show]:
                shown.append((prompt, f"{name}, {path.name}", text))
    for prompt, source, text in sorted(shown, key=lambda entry: entry[0]):
        print(f"\n== {source}\n{prompt}{text}")


if __name__ == "__main__":
    main()
