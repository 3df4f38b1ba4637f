"""A conversation on a terminal, from a pipe, or of one message: lora.py --chat."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts.answers import ready_to_answer
from parts.chat import ChatTemplate
from parts.cli import one_line, warn
from parts.conversation import Conversation
from parts.files import decode_text
from parts.run_log import say
from parts.tokenizers import Tokenizer

import mlx.nn as nn

COMMANDS = "/reset starts again, /system TEXT says how to answer, /quit or Ctrl-D leaves"


def converse(
    model: nn.Module, tokenizer: Tokenizer, template: ChatTemplate, args: argparse.Namespace
) -> None:
    """Answer `args.prompt`; without one, a conversation on a terminal, or each line of a pipe."""
    conversation = Conversation(model, tokenizer, template, args)
    with ready_to_answer():
        if args.prompt is None and sys.stdin.isatty():
            on_terminal(conversation)
            return
        say("Generating")
        messages = [args.prompt] if args.prompt is not None else piped_messages()
        for i, message in enumerate(messages):
            if i:
                print()
            show(conversation.ask(message))
            print(conversation.summary, file=sys.stderr)


def show(pieces: Iterator[str]) -> None:
    """Print an answer as it comes, and a line end. Some templates have it begin with a space."""
    begun = False
    for piece in pieces:
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        print(piece, end="", flush=True)
    print(flush=True)


def piped_messages() -> Iterator[str]:
    """Yield the lines of standard input, as they come, that are not blank. Raises ValueError."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        message = decode_text(line, f"line {number} of standard input")
        if message.strip():
            yield message


def on_terminal(conversation: Conversation) -> None:
    """Answer what is typed, until the user leaves. An error of the template's is one line, and
    Ctrl-C never ends the conversation.
    """
    with suppress(ImportError):  # with it, input() has a history and edits lines
        import readline  # noqa: F401
    print(f"{COMMANDS}; Ctrl-C ends an answer", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
            decode_text(line.encode("utf-8", "surrogateescape"), "the message")
            if line.partition(" ")[0] == "/quit":
                return
            if line:
                with first_ctrl_c() as pressed:
                    obey(conversation, line, pressed)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{COMMANDS}", file=sys.stderr)
        except ValueError as error:
            warn(one_line(error))


def obey(conversation: Conversation, line: str, stopping: Callable[[], bool]) -> None:
    """Do what a command says, or print the answer to a message. Raises ValueError."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.set_system(rest.strip())
    elif command.startswith("/"):
        print(f"there is no {command}: {COMMANDS}", file=sys.stderr)
    else:
        show(conversation.ask(line, stopping))


@contextmanager
def first_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield whether Ctrl-C was pressed meanwhile, which ends an answer after the token in hand.
    Pressed again, it raises KeyboardInterrupt.
    """
    pressed = []

    def catch(*_: object) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, catch)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
