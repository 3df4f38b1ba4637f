"""Render chat templates in a process of its own: `python -m parts.chat_renderer`.

A template is code that comes with a model. jinja2's sandbox keeps it from Python's insides, but not
from looping for ever or filling the memory, in ways that no check of single operations covers. So
a process renders it that has nothing else to lose, and that the system ends: after SECONDS of its
time for a request, by a timer that it does not handle, or, on Linux, where it asks for more than
MEMORY bytes. It starts no other process and opens no file.

Reads lines of JSON, and answers each with one. The first is {"template": ..., "seconds": ...,
"day": ...}, with the date for `strftime_now`, null for today's. A request is what the template is
rendered with, and "parts": [[n, add_generation_prompt], ...], as often as the first n messages are
rendered. An answer is {"parts": [part, ...]}, or {"error": ...}; a part too is an error, or
{"text": ..., "marks": [[start, end], ...]}, with the characters between `generation` and
`endgeneration`. Of the first, it is {"has_marks": whether there are such}.

The environment is that of transformers: its options, filters and functions.
"""

import json
import resource
import signal
import sys
from datetime import datetime

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2 << 30  # bytes, of which Python takes some 50 MB


class GenerationMarks(jinja2.ext.Extension):
    """The block `{% generation %}...{% endgeneration %}`, which notes where its text lies.

    The text stands between two characters of Unicode's noncharacters, which `find_marks` removes,
    so that it counts where it ends up, whatever the template does with it in between.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        self.environment.has_marks = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def mark(self, caller: jinja2.runtime.Macro) -> str:
        """Return the block's text, marked."""
        return f"{BEGIN}{caller()}{END}"


BEGIN, END = "\ufdd0", "\ufdd1"


def find_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without marks, and the characters between each two."""
    pieces, marks, length, start = [], [], 0, 0
    for piece in text.replace(END, f"{BEGIN}{END}").split(BEGIN):
        if piece.startswith(END):
            marks.append((start, length))
            piece = piece[1:]
        start = length
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), marks


def raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def to_json(value: object, ensure_ascii: bool = False, **options: object) -> str:
    """The filter `tojson`, without jinja2's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def compile_template(source: str, day: str | None) -> jinja2.Template:
    """Return the template. day: see above. Raises jinja2.TemplateError."""

    def strftime_now(form: str) -> str:
        return (datetime.fromisoformat(day) if day else datetime.now()).strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationMarks, jinja2.ext.loopcontrols],
    )
    environment.has_marks = False
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


def render_parts(template: jinja2.Template, request: dict) -> dict:
    """Return the answer to a request. Keys of messages that have no value are left out."""
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in request.pop("messages")
    ]
    if any(mark in json.dumps(messages, ensure_ascii=False) for mark in (BEGIN, END)):
        raise ValueError("a message holds U+FDD0 or U+FDD1, which are no characters")
    answers = []
    for n, prompt in request.pop("parts"):
        names = {**request, "add_generation_prompt": prompt, "documents": None}
        try:
            text, marks = find_marks(template.render(messages=messages[:n], **names))
            text.encode()  # half a character is an error here
            answers.append({"text": text, "marks": marks})
        except Exception as error:  # a template may raise anything
            answers.append({"error": describe(error)})
    return {"parts": answers}


def describe(error: Exception) -> str:
    """Return what is wrong."""
    if isinstance(error, MemoryError):
        return f"it needs more than {MEMORY >> 20} MB"
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    where = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
    return f"{where}{error or type(error).__name__}"


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks decides
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    template, seconds = None, 0
    for line in sys.stdin:
        try:
            request = json.loads(line)
            seconds = request.pop("seconds", seconds)
            signal.setitimer(signal.ITIMER_PROF, seconds)
            if template is None:
                template = compile_template(request["template"], request["day"])
                answer = {"has_marks": template.environment.has_marks}
            else:
                answer = render_parts(template, request)
        except Exception as error:
            answer = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
