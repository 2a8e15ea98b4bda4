"""Runs the chat in a terminal or a pipe: answers go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import glob
import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.table import Table

from llava_steering_plugin.chat.conversation import Chat, ChatError
from llava_steering_plugin.errors import SteeringError, nearest
from llava_steering_plugin.pool.pool import BASE

COMMANDS = {
    "/adapter": ("/adapter NAME", "let this adapter answer; without NAME, list the adapters"),
    "/image": ("/image FILE", "start over with this image; `/image none`: without one; without FILE, show its name"),
    "/reset": ("/reset", "start over with the same adapter and image"),
    "/help": ("/help", "show this list"),
    "/exit": ("/exit", "end the chat, as Ctrl-D does; Ctrl-C ends the current answer only"),
}
NO_IMAGE = "none"


@dataclass
class Terminal:
    """Reads questions and commands line by line and carries them out."""

    chat: Chat
    lines: TextIO = field(default_factory=lambda: sys.stdin)
    answers: TextIO = field(default_factory=lambda: sys.stdout)
    notes: Console = field(default_factory=lambda: _console(sys.stderr))

    def run(self) -> None:
        """Run the chat until /exit or the end of the input."""
        if isinstance(self.lines, io.TextIOWrapper):
            self.lines.reconfigure(errors="replace")  # a byte that is not UTF-8 must not end the chat
        names = len(self.chat.pool.names()) - 1
        self._note(f"{self.chat.adapter} answers; {names} adapter(s) loaded; /help lists the commands.")
        going_on = True
        with self._completion():
            while going_on:
                try:
                    line = self._read()
                    going_on = line is not None and self._handle(line.strip())
                except KeyboardInterrupt:
                    self._note("\n/exit or Ctrl-D ends the chat.")
                except SteeringError as error:
                    self._note(str(error), "red")

    def _read(self) -> str | None:
        """Return the next line, None after the last one."""
        if not self.lines.isatty():
            return self.lines.readline() or None
        prompt = f"{self.chat.adapter}> "
        if not self.answers.isatty():  # input() would write the prompt among the answers
            self.notes.file.write(prompt)
            self.notes.file.flush()
            prompt = ""
        try:
            return input(prompt)
        except EOFError:
            self._note("")
            return None

    def _handle(self, line: str) -> bool:
        """Carry out one line; return False at /exit."""
        if not line.startswith("/"):
            self._ask(line)
            return True
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return False
        does: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/image": self._image,
            "/reset": self._reset,
            "/help": self._help,
        }
        if command not in does:
            hint = nearest(command, COMMANDS, spelled=str)
            raise ChatError(f"unknown command {command}: {hint}/help lists them all.")
        does[command](rest.strip())
        return True

    def _ask(self, question: str) -> None:
        shown = False

        def show(piece: str) -> None:
            nonlocal shown
            piece = piece if shown else piece.lstrip()
            shown = shown or bool(piece)
            self.answers.write(piece)
            self.answers.flush()

        try:
            answer = self.chat.ask(question, show)
        finally:
            if shown:
                self.answers.write("\n")
                self.answers.flush()
        if not answer.text:
            self._note("(an empty answer)" if not answer.stopped else "")
        self._note(f"{self.chat.adapter}: {answer.speed}{' · stopped' if answer.stopped else ''}")

    def _adapter(self, name: str) -> None:
        if not name:
            table = Table(box=None, show_header=False, pad_edge=False)
            for known in self.chat.pool.names():
                details = self.chat.pool.details(known)
                mode = "the base, without an adapter" if known == BASE else details.full_name
                size = "" if known == BASE else f"{details.parameters:,} parameters"
                table.add_row("*" if known == self.chat.adapter else "", known, mode, size, self.chat.templates[known])
            self.notes.print(table)
            return
        before = self.chat.turns
        starts_over = self.chat.use(name)
        if starts_over and before:
            self._note(f"{name} answers, with its own template: the conversation starts over.")
        elif before:
            self._note(f"{name} continues the conversation; /reset starts over.")
        else:
            self._note(f"{name} answers.")

    def _image(self, file: str) -> None:
        if not file:
            self._note(
                f"the image is {self.chat.image_file}"
                if self.chat.image_file
                else "there is no image; /image FILE sets one"
            )
        elif file == NO_IMAGE:
            self.chat.drop_image()
            self._note("the conversation starts over, without an image.")
        else:
            quoted = len(file) > 1 and file[0] == file[-1] and file[0] in "'\""  # as terminals paste dropped files
            self.chat.look_at(file[1:-1] if quoted else file)
            self._note(f"the conversation starts over, about {self.chat.image_file}.")

    def _reset(self, rest: str) -> None:
        self.chat.reset()
        self._note("the conversation starts over.")

    def _help(self, rest: str) -> None:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        for usage, meaning in COMMANDS.values():
            table.add_row(usage, meaning)
        self.notes.print(table)

    def _note(self, text: str, style: str = "dim") -> None:
        self.notes.print(text, style=style, soft_wrap=True)

    @contextlib.contextmanager
    def _completion(self) -> Iterator[None]:
        """Let Tab complete commands, adapters' names and files inside the block, and the arrow keys recall lines."""
        if not self.lines.isatty():
            yield
            return
        try:
            import readline
        except ImportError:  # some systems have none; typing works without it
            yield
            return

        def complete(line: str, number: int) -> str | None:
            found = completions(line, self.chat.pool.names())
            return found[number] if number < len(found) else None

        before, delimiters = readline.get_completer(), readline.get_completer_delims()
        readline.set_completer(complete)
        readline.set_completer_delims("")  # complete the whole line: names may contain anything
        readline.parse_and_bind("tab: complete")
        try:
            yield
        finally:
            readline.set_completer(before)
            readline.set_completer_delims(delimiters)


def _console(file: TextIO) -> Console:
    return Console(file=file, highlight=False, markup=False, width=None if file.isatty() else 160)


def completions(line: str, adapters: list[str]) -> list[str]:
    """Return the lines that begin with `line`; none for a question."""
    command, space, rest = line.partition(" ")
    if not space:
        return [known for known in COMMANDS if line.startswith("/") and known.startswith(line)]
    if command == "/adapter":
        return [f"/adapter {name}" for name in adapters if name.startswith(rest)]
    if command == "/image":
        files = sorted(glob.glob(glob.escape(os.path.expanduser(rest)) + "*"))
        return [f"/image {file}{os.sep if os.path.isdir(file) else ''}" for file in files]
    return []
