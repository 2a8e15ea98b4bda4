"""Loads mutated adapters into one model and into the pool of another, each in a child with little memory and an alarm.

    FUZZ_COUNT=20000 FUZZ_SEED=5 pytest tests/adapters/test_fuzz.py     more of them, or others
    FUZZ_SEED=5 FUZZ_ONLY=123 pytest tests/adapters/test_fuzz.py        one of them again

`test_fuzz.py` runs this file: fuzzing.py LLAVA FOLDER COUNT SEED [NUMBER]. It prints a table by kind and everything
that went wrong, and exits with 1 if anything did.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mutations import kind_of, mutate
from steered import PROMPT, ids_of, load_llava, pictures, strengthen

from llava_steering_plugin import AdapterPool, attach, joint, load_adapter, remove_adapter, save_adapter
from llava_steering_plugin.adapters.save_load import describe
from llava_steering_plugin.adapters.stored.config import AdapterConfig
from llava_steering_plugin.errors import AdapterError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS

MEMORY = 256 << 20  # what a child may take beyond what it starts with
PATIENCE = 30.0  # seconds for one mutation, which takes a hundredth of one
BATCH = 200
RESULTS = ("loaded", "refused", "foreign error", "changed model", "not finite", "killed")
MODES: dict[str, Mode] = {
    "mores": MoReS(rank=2, tokens="f4+l5", modality="vis+text", layers="1-2"),
    "mores with tokens": MoReS(tokens="all"),
    "mixlora": MixLoRA(factors=3, rank=2, start_layer=3),
    "mixlora with projector": MixLoRA(factors=2, rank=1, start_layer=3, targets="q_proj,down_proj", conditional=False),
    "both": joint(MoReS(rank=2, layers="1-2"), MixLoRA(factors=3, rank=2, start_layer=3)),
}


def save_templates(folder: Path, llava: Path) -> list[Path]:
    """Save the good adapters that the mutations start from."""
    for name, mode in MODES.items():
        model = load_llava(llava)
        attachment = strengthen(attach(model, mode))
        config = describe(attachment)
        tokens = {"<new>": 700, "<other>": 701} if name.endswith("tokens") else {}
        if tokens:
            model.resize_token_embeddings(702)
        if " with " in name:
            attachment.extras |= {each for each, _ in model.named_parameters() if "mm_projector" in each}
        attachment.config = AdapterConfig(config.mode, config.settings, config.base, "v1", tokens, {"bits": 16})
        save_adapter(model, folder / name)
    return [folder / name for name in MODES]


def state_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """All that may be said of a model and its tokenizer, but for values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": [(name, value.shape, value.dtype, value.requires_grad) for name, value in tensors],
        "parts": [(name, type(part), part.training) for name, part in model.named_modules()],
        "hooks": sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()),
        "config": repr(sorted(model.config.to_dict().items(), key=str)),
        "attributes": sorted(model.__dict__),
        "sizes": (model.vocab_size, model.get_input_embeddings().num_embeddings, model.lm_head.out_features),
        "tokens": (len(tokenizer), sorted(tokenizer.get_added_vocab().items())),
        "defaults": (torch.get_default_dtype(), torch.empty(0).device.type),
    }


class Checked:
    """A model that has to stay as it was.

    Args:
        load: loads the adapter in a folder and returns a call of the model with it, and a call that takes it off.
    """

    def __init__(self, model: Any, tokenizer: Any, load: Callable[[Path], tuple[Callable[[], Any], Callable[[], Any]]]):
        self.model, self.tokenizer, self.load = model, tokenizer, load
        self._state = state_of(model, tokenizer)
        self._values = [value.detach().clone() for value in self._tensors()]

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def changes(self) -> list[str]:
        """Return what is not as it was."""
        state = state_of(self.model, self.tokenizer)
        found = [key for key in state if state[key] != self._state[key]]
        if not found and not all(map(torch.equal, self._tensors(), self._values)):
            found.append("values")
        return found

    def outcome(self, folder: Path) -> tuple[str, str]:
        """Load, answer and take off; return one of `RESULTS` and what there is to say of it."""
        try:
            call, take_off = self.load(folder)
        except AdapterError as error:
            said = str(error)
            result = (
                ("refused", "") if said.strip() and len(said) < 20_000 else ("foreign error", f"says {said[:200]!r}")
            )
        except BaseException:  # noqa: BLE001
            return "foreign error", traceback.format_exc(limit=-6)
        else:
            try:
                logits = call()
                take_off()
            except BaseException:  # noqa: BLE001
                return "foreign error", traceback.format_exc(limit=-6)
            result = ("loaded", "") if bool(torch.isfinite(logits).all()) else ("not finite", "logits")
        if changes := self.changes():
            return "changed model", f"after it was {result[0]}: {', '.join(changes)}"
        return result


def doors(llava: Path) -> dict[str, Checked]:
    """Return both ways into a model, each with a model of its own."""
    from transformers import AutoTokenizer

    def a_tokenizer() -> Any:
        return AutoTokenizer.from_pretrained(llava, use_fast=False)

    asked = {"input_ids": ids_of(PROMPT), "images": pictures(1)}
    alone, shared, tokenizer, other = load_llava(llava), load_llava(llava), a_tokenizer(), a_tokenizer()
    pool = AdapterPool(shared, other)

    def attached(folder: Path) -> Any:
        load_adapter(alone, folder, tokenizer)
        return lambda: alone(**asked).logits, lambda: remove_adapter(alone)

    def pooled(folder: Path) -> Any:
        pool.load("pets", folder)
        return lambda: shared(**asked, adapter_names="pets").logits, lambda: pool.unload("pets")

    return {"load_adapter": Checked(alone, tokenizer, attached), "pool": Checked(shared, other, pooled)}


@dataclass
class Fuzzing:
    """Goes through mutations by number, in children that may die.

    Attributes:
        work: an empty folder.
        failures: one text for each thing that went wrong.
    """

    templates: list[Path]
    doors: dict[str, Checked]
    work: Path
    seed: int
    counts: dict[str, Counter[tuple[str, str]]]
    failures: list[str]

    def run(self, numbers: list[int]) -> None:
        while numbers:
            done = self._batch(numbers[:BATCH])
            numbers = numbers[done:]

    def _batch(self, numbers: list[int]) -> int:
        """Run some numbers in a child; return how many were done, the one at which it died with them."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            status = 1
            try:
                os.close(reading)
                self._child(numbers, writing)
                status = 0
            finally:
                os._exit(status)
        os.close(writing)
        done = 0
        with os.fdopen(reading) as lines:
            for line in lines:
                number, door, result, detail = json.loads(line)
                if door:
                    self._note(number, door, result, detail)
                done += not door
        status = os.waitpid(child, 0)[1]
        if status and done < len(numbers):
            reason = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
            self._note(numbers[done], "child", "killed", f"{reason}; SIGALRM: it hung")
            done += 1
        return done

    def _child(self, numbers: list[int], writing: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(self.work)
        for number in numbers:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)  # nobody handles it, so it ends the process whatever it does
            mutate(self.template(number), self.work / "pets", self.seed, number)
            broken = False
            for door, checked in self.doors.items():
                result, detail = checked.outcome(self.work / "pets")
                broken |= result not in ("loaded", "refused")
                os.write(writing, (json.dumps([number, door, result, detail]) + "\n").encode())
            os.write(writing, (json.dumps([number, "", "", ""]) + "\n").encode())
            if broken:
                return  # the next one gets models that are as they were

    def template(self, number: int) -> Path:
        return self.templates[random.Random(f"template {self.seed}/{number}").randrange(len(self.templates))]

    def _note(self, number: int, door: str, result: str, detail: str) -> None:
        self.counts.setdefault(kind_of(number), Counter())[door, result] += 1
        if result not in ("loaded", "refused"):
            self.failures.append(
                f"mutation {number} of seed {self.seed} ({kind_of(number)}, {self.template(number).name}) by {door}: "
                f"{result}: {detail}"
            )


def table(counts: dict[str, Counter[tuple[str, str]]], names: list[str]) -> Iterator[str]:
    """Yield the lines of the table that is printed, in the columns of Markdown."""
    columns = [(door, result) for door in names for result in RESULTS[:2]]
    yield "| kind | mutations | " + " | ".join(f"{door}: {result}" for door, result in columns) + " | wrong |"
    yield "| --- |" + " ---: |" * (len(columns) + 2)
    whole: Counter[tuple[str, str]] = sum(counts.values(), Counter())
    for kind, of_kind in [*counts.items(), ("all", whole)]:
        wrong = sum(count for (_, result), count in of_kind.items() if result not in RESULTS[:2])
        tried = sum(count for (door, _), count in of_kind.items() if door in (names[0], "child"))
        cells = [str(tried), *(str(of_kind[column]) for column in columns), str(wrong)]
        yield f"| {kind} | " + " | ".join(cells) + " |"


def main(llava: Path, work: Path, count: int, seed: int, only: int | None = None) -> int:
    torch.set_num_threads(1)
    numbers, started = list(range(count)) if only is None else [only], time.monotonic()
    templates = save_templates(work / "templates", llava)
    with torch.inference_mode():
        for template in templates:  # the good ones are good, and what is imported on the way is there in every child
            for door, checked in doors(llava).items():
                result, detail = checked.outcome(template)
                if result != ("refused" if door == "pool" and template.name.endswith("tokens") else "loaded"):
                    raise SystemExit(f"the good adapter {template.name} by {door}: {result}: {detail}")
        ways = doors(llava)
        (work / "pets").mkdir()
        fuzzing = Fuzzing(templates, ways, work, seed, {}, [])
        fuzzing.run(numbers)
    lines = [*table(fuzzing.counts, list(ways)), *fuzzing.failures[:40]]
    lines.append(
        f"{len(numbers)} mutations of seed {seed}: {len(fuzzing.failures)} wrong, {time.monotonic() - started:.0f} s"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return int(bool(fuzzing.failures))


if __name__ == "__main__":
    given = sys.argv[3:]
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, given)))
