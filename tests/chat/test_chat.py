"""`llava-steering chat` (`cli/chat.py`, `chat/conversation.py`): upstream's answers, and input that cannot end it."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from asking import Asker, Question
from forks import Forks
from steered import strengthen
from tiny_llava import TinyLlava
from training_runs import subprocess_environment

from llava_steering_plugin import attach, joint, remove, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

pytest_plugins = ["fork_fixtures", "steered_fixtures"]

SHORT = 12  # tokens of an answer
CHAT = ["-m", "llava_steering_plugin", "chat"]
GREEDY = ["--device", "cpu", "--temperature", "0", "--max-new-tokens"]
QUESTION = Question("What color is the circle?", "00.png")
# Two of one template, of which one is two modes at once, and one of another.
KINDS: dict[str, tuple[Mode, str]] = {
    "cats": (MoReS(rank=2, tokens="all"), "v1"),
    "pets": (joint(MoReS(rank=1, tokens="f4+l5"), MixLoRA(factors=4, rank=2, alpha=1.0)), "v1"),
    "bots": (MoReS(rank=2, tokens="all", modality="vis+text"), "chatml_direct"),
}

Ended = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Place:
    """A folder with adapters, and what is needed to start a program there."""

    folder: Path
    environment: dict[str, str]

    def adapter(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def place(_shared: Any, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("chat")
    for seed, (name, (mode, conversation)) in enumerate(KINDS.items()):
        attachment = strengthen(attach(_shared, mode), seed)
        attachment.config = replace(describe(attachment), conversation=conversation)
        save_adapter(_shared, folder / name)
        remove(_shared)
    (folder / "notes.txt").write_text("no image")
    return Place(folder, subprocess_environment(patched_llava))


@pytest.fixture(scope="module")
def programs(place: Place, tiny: TinyLlava, patched_forks: Forks) -> Iterator[dict[str, Future[Ended]]]:
    """The programs whose whole input is known beforehand; two at a time."""
    image = str(tiny.images / str(QUESTION.image))
    other = str(tiny.images / "01.png")
    with_image = ["--image", image, *GREEDY, str(SHORT)]
    cats, pets, bots = (place.adapter(name) for name in KINDS)
    script = f"""{QUESTION.text}
And what shape?
/adapter pets
Is it red?
/adapter
/reset
{QUESTION.text}
/adapter bots
{QUESTION.text}

/adapter pest
/adapter ../pets
/image nowhere.png
/image notes.txt
/image .
/image
/reste
What is in <image>?
/image '{other}'
{QUESTION.text}
/image none
{QUESTION.text}
/adapter __base__
{QUESTION.text}
/help
{"What? " * 1500}
/exit
never asked
"""

    def run(words: list[str], stdin: str) -> Ended:
        return patched_forks.run(*words, stdin=stdin, cwd=place.folder)

    with ThreadPoolExecutor(2) as pool:
        cli = ["-m", "llava.serve.cli", "--model-path", cats, "--image-file", image, *GREEDY, str(SHORT)]
        yield {
            "script": pool.submit(
                run, [*CHAT, str(tiny.llava), *with_image, "--adapters", cats, f"pets={pets}", bots], script
            ),
            "cli": pool.submit(run, cli, f"{QUESTION.text}\n\n"),
            "alone": pool.submit(run, [*CHAT, cats, *with_image], QUESTION.text),
        }


@pytest.mark.slow
def test_an_adapter_answers_in_the_chat_what_it_answers_in_upstreams_chat(
    programs: dict[str, Future[Ended]], place: Place, ask: Asker, tiny: TinyLlava
) -> None:
    upstream = re.search("^USER: ASSISTANT: (.*)$", _output(programs["cli"]), re.MULTILINE)
    assert upstream is not None
    assert _output(programs["alone"]) == upstream[1].strip() + "\n"
    assert upstream[1].strip() != ask(tiny.llava, QUESTION, conversation="llava_v1", max_new_tokens=SHORT)


def test_every_answer_is_the_python_apis_for_that_adapter_image_and_conversation(
    programs: dict[str, Future[Ended]], place: Place, ask: Asker, tiny: TinyLlava
) -> None:
    def expected(model: str | Path, *turns: str, template: str = "llava_v1", image: str | None = QUESTION.image) -> str:
        prompt = _prompt(template, [("<image>\n" if image else "") + turns[0], *turns[1:]])
        return ask.complete(model, prompt, image, max_new_tokens=SHORT)

    text, base, pets, bots = QUESTION.text, tiny.llava, place.adapter("pets"), place.adapter("bots")
    first = expected(base, text)
    second = expected(base, text, first, "And what shape?")
    answers = [
        first,
        second,
        expected(pets, text, first, "And what shape?", second, "Is it red?"),
        expected(pets, text),
        expected(bots, text, template="chatml_direct"),
        expected(bots, text, template="chatml_direct", image="01.png"),
        expected(bots, text, template="chatml_direct", image=None),
        expected(base, text, image=None),
    ]
    assert _output(programs["script"]).splitlines() == answers
    assert len(set(answers)) == len(answers), "the adapters or the images change nothing, so nothing is shown"


def test_wrong_input_gets_a_line_that_says_what_to_do_and_the_chat_goes_on(
    programs: dict[str, Future[Ended]], tiny: TinyLlava
) -> None:
    notes = programs["script"].result().stderr
    for line in (
        "the question is empty.",
        "unknown adapter 'pest': did you mean 'pets'? Known: __base__, cats, pets, bots",
        "unknown adapter '../pets': did you mean 'pets'?",
        "there is no file nowhere.png",
        "notes.txt cannot be read as an image, or is damaged.",
        ". cannot be read as an image, or is damaged: Is a directory.",
        "unknown command /reste: did you mean /reset?",
        "a question cannot contain <image>, which stands for an image; use /image FILE.",
        "tokens with this question; the model takes 2,047. /reset begins a new one.",
    ):
        assert line in notes
    assert "Traceback" not in notes


def test_commands_say_what_they_did(programs: dict[str, Future[Ended]], tiny: TinyLlava) -> None:
    notes = programs["script"].result().stderr
    for line in (
        "__base__ answers; 3 adapter(s) loaded; /help lists the commands.",
        "pets continues the conversation; /reset starts over.",
        "bots answers, with its own template: the conversation starts over.",
        f"the conversation starts over, about {tiny.images / '01.png'}.",
        "the conversation starts over, without an image.",
        "/image FILE",
    ):
        assert line in notes
    assert re.search(r"^\*  pets\s+mores\+mixlora\s+[\d,]+ parameters\s+llava_v1", notes, re.MULTILINE), notes


def test_every_answer_is_followed_by_its_prefill_and_decode_speed(programs: dict[str, Future[Ended]]) -> None:
    pattern = r"^(\S+): prefill \d+ tokens in [\d,]+ ms · decode 12 tokens, [\d,.]+ tokens/s$"
    speeds = re.findall(pattern, programs["script"].result().stderr, re.MULTILINE)
    assert speeds == ["__base__", "__base__", "pets", "pets", "bots", "bots", "bots", "__base__"]


@pytest.mark.slow
def test_in_a_terminal_ctrl_c_stops_the_answer_only_and_ctrl_d_ends_the_chat(
    place: Place, ask: Asker, tiny: TinyLlava
) -> None:
    words = [*CHAT, place.adapter("cats"), "--image", str(tiny.images / str(QUESTION.image)), *GREEDY, "1500"]
    with _InTerminal([sys.executable, *words], place) as chat:
        chat.until("cats> ")
        chat.type(f"{QUESTION.text}\n")
        # What it echoes, and then the first words of the answer.
        whole = ask(place.adapter("cats"), QUESTION, conversation="llava_v1", max_new_tokens=SHORT)
        chat.until(whole.split()[0])
        chat.type("\x03")
        shown = chat.until("cats> ")
        assert re.search(r"cats: prefill \d+ tokens.* · stopped", shown), shown
        chat.press_until("\x03", "/exit or Ctrl-D ends the chat.")
        chat.until("cats> ")
        chat.type("/ad\t pe\t")  # a command is completed, a name that is not there is not
        chat.until("/adapter pe")
        chat.type("\n")
        chat.until("unknown adapter 'pe'")
        chat.until("cats> ")
        chat.type("\x04")
        assert chat.ended() == 0


def _output(program: Future[Ended]) -> str:
    ended = program.result()
    assert ended.returncode == 0, f"{ended.stdout[-1000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def _prompt(template: str, turns: list[str]) -> str:
    from llava.conversation import conv_templates

    chat = conv_templates[template].copy()
    for number, turn in enumerate([*turns, None]):
        chat.append_message(chat.roles[number % 2], turn)
    return str(chat.get_prompt())


class _InTerminal:
    """A program whose input and output are a terminal of its own."""

    # The terminal becomes the program's controlling one, so that Ctrl-C reaches it as a signal; and is not ignored, as
    # it is by all that a script has started with &.
    START = (
        "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )

    def __init__(self, command: list[str], place: Place):
        self._terminal, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.START, *command],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=place.folder,
            env=place.environment | {"TERM": "dumb"},
        )
        os.close(child)
        self._unread = ""

    def __enter__(self) -> _InTerminal:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._terminal)

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def until(self, text: str, seconds: float = 120) -> str:
        """What the program shows, up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self._unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._terminal], [], [], left)[0]:
                pytest.fail(f"no {text!r} in:\n{self._unread}", pytrace=False)
            try:
                self._unread += os.read(self._terminal, 65536).decode(errors="replace")
            except OSError:  # how Linux says that the other side has closed
                pytest.fail(f"the chat ended before {text!r}:\n{self._unread}", pytrace=False)
        shown, found, self._unread = self._unread.partition(text)
        return shown + found

    def press_until(self, keys: str, text: str, seconds: float = 120) -> str:
        """Types the keys, again every few seconds: Python misses a Ctrl-C between a prompt and its wait for input."""
        end = time.monotonic() + seconds
        while text not in self._unread and time.monotonic() < end:
            self.type(keys)
            select.select([self._terminal], [], [], 2)
            while select.select([self._terminal], [], [], 0.2)[0]:
                self._unread += os.read(self._terminal, 65536).decode(errors="replace")
        return self.until(text, 1)

    def ended(self) -> int:
        return self._process.wait(timeout=60)
