"""Ask the base and all MoReS adapters the test by upstream's evaluation and by vLLM, and compare every text.

Upstream's `model_vqa_loader` is a program for each model, one a core at a time, and answers question by question.
vLLM is one engine on all cores, in which the questions to all models lie mixed. Both compute in float32.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from experiments import camera, commands
from experiments.base import Base
from experiments.stages import THREADS, Context, Done, Runner, Stage, StageError

PROGRAM = Path(__file__).with_name("answer_in_vllm.py")
CONVERSATION = "v1"
SHOWN = 5  # differences that an error lists
Work = Callable[[Context], dict[str, Any]]


def vllms_python() -> Path:
    """Return the interpreter of the environment with vLLM.

    Raises:
        StageError: there is none.
    """
    found = Path(f"{sys.prefix}-vllm") / "bin" / "python"
    if not found.exists():
        raise StageError(f"--vllm needs {found}, which `scripts/setup.sh --vllm` makes")
    return found


def compare(base: Base, adapters: Mapping[str, Path], cells: Sequence[str], asked: Done, runner: Runner) -> list[Done]:
    """Return the stages of the export, of upstream's evaluation and of vLLM, which says how many texts are equal.

    Args:
        adapters: folders of MoReS adapters, by their names.
        cells: what the adapters were trained with; they change with the adapters.
        asked: the stage that wrote test.jsonl.

    Raises:
        StageError: one of them failed, or texts differ.
    """
    models: dict[str, Path] = {"base": base.model, **adapters}
    pictures, questions = camera.pictures(base), asked.folder / "test.jsonl"
    exported = runner.run(Stage("exported-base", {}, (base.done,), _export(base)))
    settings: dict[str, Any] = {"cells": list(cells), "threads": THREADS}
    needs, code = (asked, base.data, exported), (commands, sys.modules[__name__])
    work = _by_upstream(models, pictures, questions)
    upstream = runner.run(Stage("answers-upstream", settings, needs, work, code))
    work = _by_vllm(exported, models, pictures, questions, upstream)
    settings["program"] = PROGRAM.read_text()
    return [exported, upstream, runner.run(Stage("answers-vllm", settings, (*needs, upstream), work, code))]


def sentence(upstream: Mapping[str, Any], vllm: Mapping[str, Any]) -> str:
    """Return what came out, in one sentence."""
    count = vllm["equal"]
    return (
        f"All {count:,} texts are equal. Upstream's evaluation took {upstream['seconds']:.0f} s "
        f"({count / upstream['seconds']:.0f} a second), vLLM {vllm['answering']:.1f} s "
        f"({count / vllm['answering']:.0f} a second), and {vllm['seconds'] - vllm['answering']:.0f} s to start."
    )


def _export(base: Base) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        words = ["export", str(base.model), str(stage.folder / "base"), "--conversation", CONVERSATION]
        stage.run([sys.executable, "-m", "llava_steering_plugin", *words])
        return {}

    return work


def _by_upstream(models: Mapping[str, Path], pictures: Path, questions: Path) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        def one(name: str) -> None:
            answers = stage.folder / f"{name}.jsonl"
            answers.with_suffix("").mkdir()
            alone = Context(answers.with_suffix(""), 1, lambda _at, _total: None)
            alone.run(commands.evaluate(answers, models[name], pictures, questions))

        begun = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:
            for done, _ in enumerate(pool.map(one, models), start=1):
                stage.report(done, len(models))
        return {"seconds": time.monotonic() - begun, "models": list(models)}

    return work


def _by_vllm(exported: Done, models: Mapping[str, Path], pictures: Path, questions: Path, upstream: Done) -> Work:
    def work(stage: Context) -> dict[str, Any]:
        asking, answers = stage.folder / "asked.json", stage.folder / "answers.json"
        adapters = {name: str(folder) for name, folder in models.items() if name != "base"}
        prompts = [
            {**prompt, "adapter": name if name in adapters else None}
            for prompt in _prompts(questions, pictures)
            for name in models
        ]
        content = {"base": str(exported.folder / "base"), "adapters": adapters, "tokens": commands.NEW_TOKENS}
        asking.write_text(json.dumps({**content, "asked": prompts}))
        begun = time.monotonic()
        stage.run([str(vllms_python()), str(PROGRAM), str(asking), str(answers)])
        seconds = time.monotonic() - begun
        said = json.loads(answers.read_text())
        texts = {name: said["texts"][place :: len(models)] for place, name in enumerate(models)}
        if found := different(texts, upstream.folder):
            shown = "\n".join(found[:SHOWN]) + ("\n..." if len(found) > SHOWN else "")
            raise StageError(
                f"{len(found):,} of {len(prompts):,} texts differ:\n{shown}\nAll: {answers}, {upstream.folder}"
            )
        times = {"seconds": seconds, "answering": said["seconds"]}
        return {"equal": len(prompts), **times, "versions": said["versions"]}

    return work


def _prompts(questions: Path, pictures: Path) -> Iterator[dict[str, str]]:
    """Yield the text of LLaVA's own prompt and the picture, of each question."""
    from llava.conversation import conv_templates

    for line in filter(None, questions.read_text().split("\n")):
        one = json.loads(line)
        written = conv_templates[CONVERSATION].copy()
        written.append_message(written.roles[0], f"<image>\n{one['text']}")
        written.append_message(written.roles[1], None)
        yield {"text": written.get_prompt(), "image": str(pictures / one["image"])}


def different(texts: Mapping[str, Sequence[str]], upstream: Path) -> list[str]:
    """Return where vLLM's texts are not those of upstream's files, question by question.

    Args:
        texts: vLLM's, by the names of the models.
        upstream: the folder with a file of answers for each model.

    Raises:
        StageError: one engine has answered other questions than the other.
    """
    found = []
    for name, given in texts.items():
        lines = filter(None, (upstream / f"{name}.jsonl").read_text().split("\n"))
        expected = [json.loads(line)["text"] for line in lines]
        if len(given) != len(expected):
            raise StageError(f"{name}: vLLM has answered {len(given)} of {len(expected)} questions")
        found += [
            f"question {place} to {name}: vLLM says {text!r}, upstream's evaluation {other!r}"
            for place, (text, other) in enumerate(zip(given, expected, strict=True))
            if text != other
        ]
    return found
