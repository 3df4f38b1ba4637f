"""lora.py's command line: the numbers that flags take, and what cannot be given together."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from parts import adapter_formats, adapters, chat, cli, schedules
from parts.cli import did_you_mean, warn
from parts.files import decode_text
from parts.prompt_file import read_prompts
from parts.sampling import Sampling

COUNT = cli.number(int, lambda n: 1 <= n <= sys.maxsize, "a whole number of at least 1")
LENGTH = cli.number(int, lambda n: n >= 2, "a whole number of at least 2")
BATCHES = cli.number(
    int, lambda n: n == -1 or n >= 1, "a whole number of at least 1, or -1 for all"
)
TEMPERATURE = cli.number(float, lambda t: t >= 0, "a number of at least 0")
RATE = cli.number(float, lambda r: r > 0, "a number above 0")
NOT_NEGATIVE = cli.number(float, lambda x: x >= 0, "a number of at least 0")
EPOCHS = cli.number(float, lambda n: 0 < n <= 1e6, "a number above 0 and up to a million")
UPDATES = cli.number(int, lambda n: 0 <= n <= sys.maxsize, "a whole number of at least 0")
SHARE = cli.number(float, lambda p: 0 <= p < 1, "a number from 0 to below 1")
RANK = cli.number(int, lambda n: 1 <= n <= 4096, "a whole number from 1 to 4096")
SCALE = cli.number(float, lambda s: 0 < s <= 1e4, "a number above 0 and up to 10000")
POSITIVE_SHARE = cli.number(float, lambda p: 0 < p <= 1, "a number above 0 and up to 1")
FRACTION = cli.number(float, lambda p: 0 <= p <= 1, "a number from 0 to 1")
PENALTY = cli.number(float, lambda x: 0.01 <= x <= 100, "a number from 0.01 to 100")
CACHE_SIZE = cli.number(int, lambda n: 16 <= n <= sys.maxsize, "a whole number of at least 16")
SEED = cli.number(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")


def stop_text(text: str) -> str:
    """The `type` of a text that ends another."""
    if not text or not is_unicode(text):
        raise argparse.ArgumentTypeError(f"{text!r} is {'no text' if not text else 'not UTF-8'}")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text of the command line was valid UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class Projections(argparse.Action):
    """Store the projections, each once and in the order of the block; `all` stands for all."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        chosen = [name for name in adapters.PROJECTIONS if name in values or "all" in values]
        setattr(namespace, self.dest, chosen)


def add_lora_flags(add: Callable) -> None:
    """Add the flags of LoRA that the documented example does not have.

    add: `add_argument` of their group.
    """
    add(
        "--lora-projections",
        nargs="+",
        action=Projections,
        choices=[*adapters.PROJECTIONS, "all"],
        default=["wq", "wv"],
        metavar="NAME",
        help="what to adapt in each of these layers: any of wq wk wv wo (attention) and w1 w2 w3 "
        "(feed-forward), or all (default: wq wv)",
    )
    add("--lora-rank", type=RANK, default=8, help="columns of A, rows of B")
    add("--lora-scale", type=SCALE, default=adapters.LORA_SCALE, help="the factor of x A B")
    add("--lora-dropout", type=SHARE, default=0.0, help="share of x that A does not see in a step")


def add_update_flags(add: Callable) -> None:
    """Add the flags of a training's updates that the documented example does not have.

    add: `add_argument` of their group.
    """
    add("--grad-accumulation", type=COUNT, default=1, help="batches that one update sums up")
    add("--warmup", type=UPDATES, default=0, help="updates in which the learning rate rises")
    add(
        "--lr-schedule",
        choices=schedules.SCHEDULES,
        default="constant",
        help="how the learning rate falls after the warmup, down to 0 at the end",
    )
    add("--max-grad-norm", type=RATE, help="clip gradients to this global norm")
    add("--weight-decay", type=NOT_NEGATIVE, default=0.0, help="above 0: AdamW instead of Adam")
    add("--patience", type=COUNT, help="validations without a better one that end the training")


def add_data_flags(add: Callable) -> None:
    """Add the flags of prompts and chats, which the documented example does not have.

    add: `add_argument` of their group.
    """
    add_mask_prompt(add)
    add(
        "--pack",
        action="store_true",
        help="short texts share rows, none sees another: a batch is --batch-size times "
        "--max-seq-length tokens of as many texts as that holds",
    )
    add_chat_template(add)


def add_mask_prompt(add: Callable) -> None:
    """Add the flag of what the loss counts. add: `add_argument` of its group."""
    add(
        "--mask-prompt",
        action="store_true",
        help="the loss counts completions, and of chats the assistant's answers, alone",
    )


def add_chat_template(add: Callable) -> None:
    """Add the flag of the chat template. add: `add_argument` of its group."""
    add(
        "--chat-template",
        metavar="TEMPLATE",
        help="for chats, in place of the model's own: a Jinja file, or one of "
        f"{', '.join(chat.BUILT_IN)}",
    )


class BatchSize(argparse.Action):
    """Store the batch size, and that it is also how many prompts are answered together."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: int,
        option_string: str | None = None,
    ) -> None:
        namespace.batch_size = namespace.rows = values


def add_batch_size(add: Callable) -> None:
    """Add the flag of the batch size. add: `add_argument` of its group."""
    add(
        "--batch-size",
        type=COUNT,
        action=BatchSize,
        default=4,
        help="sequences a step, on all ranks; with --prompts, prompts that are answered together "
        "(then by default as many as fit)",
    )


def add_asking_flags(add: Callable) -> None:
    """Add the flags that ask a chat model, or many prompts. add: `add_argument` of their group."""
    add(
        "--chat",
        action="store_true",
        help="the prompt is a message to the assistant; without one, a conversation: on a terminal "
        "until /quit, from a pipe a message a line",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="answer each line of a file, a JSON object or text, to standard output as JSON; - "
        "reads them",
    )


def add_sampling_flags(add: Callable) -> None:
    """Add the flags of generation that the documented example does not have.

    add: `add_argument` of their group.
    """
    add("--top-k", type=UPDATES, default=0, help="sample from so many likeliest tokens, 0: all")
    add(
        "--top-p",
        type=POSITIVE_SHARE,
        default=1.0,
        help="sample from the likeliest tokens that together have this probability",
    )
    add(
        "--min-p",
        type=FRACTION,
        default=0.0,
        help="sample from tokens of at least this share of the likeliest one's probability",
    )
    add(
        "--repetition-penalty",
        type=PENALTY,
        default=1.0,
        help="above 1, tokens of the prompt and of the text so far become less likely",
    )
    add(
        "--repetition-window",
        type=COUNT,
        metavar="N",
        help="the last N tokens, to which that penalty applies (default: all)",
    )
    add(
        "--stop",
        type=stop_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times (default: none)",
    )
    add(
        "--max-kv-size",
        type=CACHE_SIZE,
        metavar="N",
        help="remember N tokens at most: the first 4 and the last ones (default: all that the "
        "model sees)",
    )


def idle_flags(args: argparse.Namespace) -> list[str]:
    """Return, of each flag that changes nothing in this run, what it is for."""
    neutral = {**Sampling()._asdict(), "stop": [], "max_kv_size": None}
    given = [name for name in neutral if name != "temp" and getattr(args, name) != neutral[name]]
    problems = []
    generates = args.chat or args.prompt is not None or args.prompts is not None
    if not generates:
        problems += [(name, "is for --prompt, --prompts and --chat") for name in given]
    elif args.temp == 0:
        shaping = [name for name in given if name in ("top_p", "top_k", "min_p")]
        problems += [(name, "changes nothing: --temp 0 takes the likeliest") for name in shaping]
    if generates and args.repetition_penalty == 1 and args.repetition_window is not None:
        problems.append(("repetition_window", "changes nothing without --repetition-penalty"))
    if args.pack and not args.train:
        problems.append(("pack", "is for --train"))
    if args.mask_prompt and not (args.train or args.test):
        problems.append(("mask_prompt", "is for --train and --test"))
    return [f"--{name.replace('_', '-')} {problem}" for name, problem in problems]


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return how the flags want tokens to be chosen."""
    return Sampling(*(getattr(args, name) for name in Sampling._fields))


def check_arguments(args: argparse.Namespace, n_ranks: int = 1, writes: bool = True) -> None:
    """Find what cannot work before anything is loaded, and read the prompt from `-`.

    n_ranks: processes of this run. writes: whether this is the one that reads and writes files.
    Raises ValueError or FileNotFoundError.
    """
    if not (args.train or args.test or args.chat or (args.prompt, args.prompts) != (None, None)):
        raise ValueError("nothing to do: give --train, --test, --prompt, --prompts or --chat")
    if args.batch_size % n_ranks:
        raise ValueError(
            f"--batch-size {args.batch_size} is the batch of all {n_ranks} ranks: give a multiple"
        )
    if args.prompt == "-" and n_ranks > 1:
        raise ValueError("--prompt - never ends under a launcher: give the text itself")
    if args.prompt == "-":
        if sys.stdin is None:
            raise ValueError("--prompt - reads standard input, which is closed")
        args.prompt = decode_text(sys.stdin.buffer.read(), "--prompt")
    if args.chat and args.prompt is None and args.prompts is None:
        if n_ranks > 1:
            raise ValueError("--chat needs --prompt under a launcher, which passes no input on")
        if sys.stdin is None:
            raise ValueError("--chat reads standard input, which is closed: give --prompt")
    if args.chat and args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty: give the message of --chat, or no --prompt")
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError("--prompt and --prompts do not go together: give one of them")
        if args.max_kv_size is not None:
            raise ValueError("--max-kv-size is for --prompt and --chat: leave it out")
        if args.prompts == "-" and n_ranks > 1:
            raise ValueError("--prompts - never ends under a launcher: give a file")
        args.prompts = read_prompts(args.prompts)
    if args.prompt and not is_unicode(args.prompt):
        raise ValueError("--prompt is not valid UTF-8")
    if args.train and args.no_adapter:
        raise ValueError("--no-adapter is for --test and --prompt: training makes an adapter")
    if args.resume_adapter_file is not None and not args.train:
        raise ValueError("--resume-adapter-file goes with --train; to use adapters, --adapter-file")
    if not writes:
        return
    for problem in idle_flags(args):
        warn(problem)
    if args.train:
        adapters.check_replaceable(Path(args.adapter_file))
    adapter = adapter_to_load(args)
    if adapter and Path(adapter).is_dir():
        adapter_formats.check_folder(Path(adapter))
        return
    if adapter is not None and not Path(adapter).is_file():
        raise FileNotFoundError(
            f"there is no adapter file {adapter}{did_you_mean(adapter)}: make one with --train, "
            "or give --no-adapter for the base model alone"
        )
    if adapter is not None:
        adapters.check_adapter(adapter)


def adapter_to_load(args: argparse.Namespace) -> str | None:
    """Return the adapter file that this run starts from; None for the base model alone."""
    if args.train:
        return args.resume_adapter_file
    return None if args.no_adapter else args.adapter_file
