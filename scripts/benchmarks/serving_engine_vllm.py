"""Run engines of vLLM's for the benchmark of serving, and time what they are asked.

    .venv-vllm/bin/python scripts/benchmarks/serving_engine_vllm.py ENGINES

ENGINES is JSON: of each engine by its name, `base`, the exported base; `settings` of vllm.LLM; `adapters`, folders.
All of them run in this process, and stay until its standard input ends. Each line there is one question as JSON, and is
answered by one line: `engine`; `groups` of prompts, each group at once and one after the other, a prompt being
[text, seed of its image, number of its adapter or null]; `tokens` of every answer.

`python scripts/benchmarks serving --engine vllm` starts it.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from typing import Any, TextIO

SIDE = 112

# Read when vLLM is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine that waits in a process of its own looks for work all the time
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS says how many threads there are
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Engine:
    """An engine with all of its adapters loaded."""

    def __init__(self, base: str, settings: dict[str, Any], adapters: list[str]):
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        # Where a second engine is made, the metrics of the first one fail.
        self.llm: Any = LLM(base, dtype="float32", enable_lora=True, disable_log_stats=True, **settings)
        self.adapters = [
            LoRARequest(f"adapter-{number}", number, folder) for number, folder in enumerate(adapters, start=1)
        ]
        for adapter in self.adapters:
            self.llm.llm_engine.add_lora(adapter)

    def answer(self, groups: list[list[tuple[str, int, int | None]]], tokens: int) -> dict[str, Any]:
        """Return the seconds that all groups take, and the tokens of all answers."""
        from PIL import Image
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        prepared = []
        for group in groups:
            images = [
                Image.frombytes("RGB", (SIDE, SIDE), random.Random(seed).randbytes(3 * SIDE**2)) for _, seed, _ in group
            ]
            prompts = [
                {"prompt": text, "multi_modal_data": {"image": image}}
                for (text, _, _), image in zip(group, images, strict=True)
            ]
            adapters = [None if number is None else self.adapters[number] for _, _, number in group]
            prepared.append((prompts, adapters))
        self.llm.reset_prefix_cache()
        gc.collect()
        begun = time.perf_counter()
        done = [
            answer
            for prompts, adapters in prepared
            for answer in self.llm.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
        ]
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "answers": [list(each.outputs[0].token_ids) for each in done]}


def main(engines: dict[str, Any], answers: TextIO) -> None:
    """Make the engines, say which versions they have, and answer until there are no more questions."""
    import torch
    import vllm

    made = {name: Engine(**of) for name, of in engines.items()}
    _write(answers, {"vllm": vllm.__version__, "vllm's torch": torch.__version__, "threads": torch.get_num_threads()})
    for line in sys.stdin:
        asked = json.loads(line)
        _write(answers, made[asked["engine"]].answer(asked["groups"], asked["tokens"]))


def _write(answers: TextIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which holds names of its own
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)  # what vLLM prints goes to the log
        main(json.loads(sys.argv[1]), channel)
