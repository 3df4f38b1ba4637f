"""Chats to text by a model's chat template, and which characters of it the assistant answers."""

import json
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from parts.files import check_content, digest
from parts.records import Chat
from parts.tokenizers import Tokenizer

FILE = "chat_template.jinja"  # in a model's folder
SECONDS = 20  # of a processor that a template may take at once
AT_ONCE = 64  # beginnings of a chat that are rendered at once
# What templates that write today's date, such as Llama 3.2's, write into training and test data: a
# run is the same on each day, and may be resumed on another. Llama's own where none is known.
TRAINING_DAY = "2024-07-26"
ROOT = Path(__file__).resolve().parent.parent

# Of the published formats. A system message of Llama 2 and Mistral is part of the first question. A
# content may be parts of text, which follow each other; none of them has tools.
BEGINNING = """\
{%- macro text(message) %}
    {%- if message.tool_calls or message.function_call %}
        {{- raise_exception(NO_TOOLS) }}
    {%- elif message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}{{- part.text }}{% endfor %}
    {%- endif %}
{%- endmacro %}
{%- if tools %}{{- raise_exception(NO_TOOLS) }}{% endif %}
""".replace("NO_TOOLS", "'it has no tools: give the template that the model came with'")
CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- text(message) + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- text(message) + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- text(message) | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- text(message) | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
IN_TURNS = """\
{%- set first = namespace(system='') %}
{%- if messages and messages[0].role == 'system' %}
    {%- set first.system = SYSTEM %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != ('assistant' if loop.index0 % 2 else 'user') %}
        {{- raise_exception('user and assistant have to take turns, the user first') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- USER }}
    {%- else %}
        {%- generation %}{{- ' ' + text(message) | trim + END }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
LLAMA2 = (
    IN_TURNS.replace("SYSTEM", "'<<SYS>>\\n' + text(messages[0]) | trim + '\\n<</SYS>>\\n\\n'")
    .replace(
        "USER",
        "bos_token + '[INST] ' + (first.system if loop.first else '') "
        "+ text(message) | trim + ' [/INST]'",
    )
    .replace("END", "' ' + eos_token")
)
MISTRAL = "{{- bos_token }}\n" + IN_TURNS.replace(
    "SYSTEM", "text(messages[0]) | trim + '\\n\\n'"
).replace(
    "USER",
    "'[INST] ' + (first.system if loop.first else '') + text(message) | trim + ' [/INST]'",
).replace("END", "eos_token")
BUILT_IN = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL}
BUILT_IN = {name: BEGINNING + source for name, source in BUILT_IN.items()}


class Rendered(NamedTuple):
    """A chat as text, and the characters between the template's `generation` marks."""

    text: str
    marks: list[tuple[int, int]]


class ChatTemplate:
    """A chat template, in the Jinja that transformers reads. `name` is what errors call it.

    bos_token, eos_token: the texts of the tokens that begin and end one. seconds: of a processor
    for one chat. day: the date that it takes for today's, such as TRAINING_DAY; None is today.
    Raises ValueError where it is no template, or jinja2 is missing.
    """

    def __init__(
        self,
        source: str,
        name: str,
        bos_token: str,
        eos_token: str,
        seconds: float = SECONDS,
        day: str | None = None,
    ):
        self.name, self.source, self._seconds, self._process = name, source, seconds, None
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        first = {"template": source, "seconds": seconds, "day": day}
        self.has_marks = self._ask(first)["has_marks"]
        written = day or "" if "strftime_now" in source else ""
        self.digest = digest("\0".join([source, bos_token, eos_token, written]).encode())

    def render(self, chat: Chat, add_generation_prompt: bool = False) -> Rendered:
        """Return the text of a chat; with `add_generation_prompt`, the beginning of the answer that
        comes next. Raises ValueError where the template fails, loops for ever or fills the memory.
        """
        (rendered,) = self.render_parts(chat, [(len(chat.messages), add_generation_prompt)])
        return rendered

    def render_parts(self, chat: Chat, parts: list[tuple[int, bool]]) -> list[Rendered | None]:
        """Return what `render` does of the first n messages, for each n and whether the beginning
        of an answer is added; None where the template fails for n = 0, since many do.
        """
        request = {"messages": chat.messages, "tools": chat.tools, **self._tokens}
        found = []
        for start in range(0, len(parts), AT_ONCE):
            some = parts[start : start + AT_ONCE]
            found += self._ask({**request, "parts": some})["parts"]
        return [self._read(answer, n) for answer, (n, _) in zip(found, parts, strict=True)]

    def _read(self, answer: dict, n: int) -> Rendered | None:
        if "error" not in answer:
            return Rendered(answer["text"], [tuple(mark) for mark in answer["marks"]])
        if n:
            raise self._failure(answer["error"])
        return None

    def _failure(self, problem: str) -> ValueError:
        return ValueError(f"{self.name} does not work: {' '.join(str(problem).split())[:300]}")

    def _ask(self, request: dict) -> dict:
        """Return the process's answer to a request. Start it for the first."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "parts.chat_renderer"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                start_new_session=True,
            )
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except KeyboardInterrupt:  # the answer that comes yet would be taken for the next one's
            self.close()
            raise
        if not line:
            problem, status = self._process.stderr.read(), self._process.wait()
            self.close()
            if "No module named 'jinja2'" in problem:
                raise ValueError("chats need jinja2: pip install jinja2")
            last = (problem.strip().splitlines() or [f"its process ended with {status}"])[-1]
            if status == -signal.SIGPROF:
                last = f"it takes more than {self._seconds:g} s, or never ends"
            raise self._failure(last)
        answer = json.loads(line)
        if "error" in answer:
            raise self._failure(answer["error"])
        return answer

    def close(self) -> None:
        """End the process. Another request starts no new one."""
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            stream.close()
        self._process.kill()
        self._process.wait()

    def __del__(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.close()


def load_template(
    choice: str | None, folder: Path, tokenizer: Tokenizer, day: str | None = None
) -> ChatTemplate:
    """Return the template of a model's folder, or in its place the one that `choice` names: a file,
    or one of BUILT_IN. day: see ChatTemplate. Raises FileNotFoundError or ValueError.
    """
    tokens = token_text(tokenizer, tokenizer.bos_id), token_text(tokenizer, tokenizer.eos_id)
    if choice in BUILT_IN:
        return ChatTemplate(BUILT_IN[choice], f"--chat-template {choice}", *tokens)
    names = ", ".join(BUILT_IN)
    path = Path(choice) if choice is not None else folder / FILE
    if choice is None and not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {FILE}, which chats need: give --chat-template, a file or one of "
            f"{names}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"--chat-template {choice} is no file, and none of {names}")
    check_content(path)
    try:
        source = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    return ChatTemplate(source, str(path), *tokens, day=day)


def token_text(tokenizer: Tokenizer, token: int | None) -> str:
    """Return the text that names a token; nothing for None."""
    return "" if token is None else tokenizer.name_of(token)


# -------------------------------------------------------------------------------------------------
# To ask a model


def encode_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Return the token ids of a chat up to where the assistant's next answer begins. Raises
    ValueError where the template refuses the messages.
    """
    text = template.render(Chat(messages, None), add_generation_prompt=True).text
    ids = tokenizer.encode(text, bos=False, special_tokens=True)
    if not ids:
        raise ValueError(f"{template.name} makes no text of the messages")
    return ids


def end_of_turn(
    template: ChatTemplate, tokenizer: Tokenizer
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return what the template writes after an answer of the assistant: the token, or, where that
    is no special one of this tokenizer, the text. Either may be none.
    """
    question, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4."}
    rest = template.render(Chat([question, answer], None)).text.rpartition("4.")[2].strip()
    ids = tokenizer.encode(rest, bos=False, special_tokens=True)
    if ids and tokenizer.name_of(ids[0]) in tokenizer.special_names:
        return frozenset(ids[:1]), ()
    return frozenset(), (rest,) if rest else ()


def open_template(choice: str | None, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template as `load_template` does, once it has rendered a question and an answer.
    Raises ValueError or FileNotFoundError.
    """
    template = load_template(choice, folder, tokenizer)
    end_of_turn(template, tokenizer)
    return template


# -------------------------------------------------------------------------------------------------
# What the assistant answers


def answer_spans(template: ChatTemplate, chat: Chat, ends: frozenset[str]) -> tuple:
    """Return the text of a chat, and the characters (start, end) of each answer of the assistant,
    with the end of its turn.

    These are the template's own marks where it has some. Else an answer is what it adds to the
    rendered messages before. ends: names of special tokens; of white space that follows one at the
    end of an answer, nothing counts. Raises ValueError where that is ambiguous.
    """
    n = len(chat.messages)
    if template.has_marks:
        return template.render(chat)
    answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    parts = [(n, False), *chain(*([(i, True), (i + 1, False)] for i in answers))]
    text, *rendered = [part and part.text for part in template.render_parts(chat, parts)]
    spans, position = [], 0
    for i, before, after in zip(answers, rendered[::2], rendered[1::2], strict=True):
        message, last = chat.messages[i], content_of(chat.messages[i - 1]) if i else ""
        start, begin = find_end(text, before, last, position), find_end(after, before, last, 0)
        end = None
        if start is not None and begin is not None:
            end = find_answer(text[start:], after[begin:], content_of(message))
        if end is None:
            raise ValueError(
                f"{template.name} does not show which tokens are the assistant's in message {i + 1}"
                ": give it {% generation %} marks, or leave --mask-prompt out"
            )
        position = start + end
        stripped = text[start:position].rstrip()
        if stripped.endswith(tuple(ends)):
            position = start + len(stripped)
        spans.append((start, position))
    return text, spans


def content_of(message: dict) -> str:
    """Return what any template shows of a message's content: without the thoughts before it, and
    white space around it.
    """
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = content[-1]["text"]
    return content.rpartition("</think>")[2].strip()


def find_end(text: str, before: str | None, last: str, position: int) -> int | None:
    """Return where in `text`, from `position` on, the messages end of which `before` is the text,
    with the beginning of the answer; None where they are not to be found.

    last: the content of the last of them. Templates may move what comes before it, such as tools,
    to another message; it and what follows it stay together.
    """
    if before is None:
        return None
    if text.startswith(before):
        return len(before)
    at = before.rfind(last) if last else -1
    if at < 0:
        return None
    found = text.find(before[at:], position)
    return found + len(before) - at if found >= 0 else None


def find_answer(text: str, answer: str, content: str) -> int | None:
    """Return how long the answer is with which `text` begins; None where it begins with none.

    answer: as it stands at the end of a chat, where templates may show more of it, such as
    thoughts: so it is the longest end of that which holds its content.
    """
    for start in range(answer.rfind(content) + 1):
        if text.startswith(answer[start:]) and start < len(answer):
            return len(answer) - start
    return None
