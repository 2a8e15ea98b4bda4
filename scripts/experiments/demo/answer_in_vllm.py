"""Answer questions about pictures with one engine of vLLM's, many adapters among them.

    .venv-vllm/bin/python scripts/experiments/demo/answer_in_vllm.py ASKED ANSWERS

ASKED is a file of JSON: `base`, the exported base; `adapters`, folders by their names; `tokens` of the longest answer;
`asked`, for each prompt its `text`, the file of its `image` and the name of its `adapter`, or null. ANSWERS gets
`texts`, in that order; the `seconds` that all of them took, from reading the pictures to the last text; and `versions`.

`scripts/demo.sh --vllm` starts it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Read when vLLM is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS says how many threads there are
    "VLLM_NO_USAGE_STATS": "1",
}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Return what ANSWERS gets."""
    import torch
    import vllm
    from PIL import Image
    from vllm.lora.request import LoRARequest

    engine: Any = vllm.LLM(
        asked["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        enable_lora=True,
        max_lora_rank=8,
        max_loras=max(1, len(asked["adapters"])),
        lora_target_modules=["steering", "steering_tokens"],
    )
    adapters = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(asked["adapters"].items(), start=1)
    }
    for adapter in adapters.values():
        engine.llm_engine.add_lora(adapter)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=asked["tokens"])
    begun = time.perf_counter()
    pictures = {file: Image.open(file).convert("RGB") for file in {one["image"] for one in asked["asked"]}}
    done = engine.generate(
        [{"prompt": one["text"], "multi_modal_data": {"image": pictures[one["image"]]}} for one in asked["asked"]],
        sampling,
        lora_request=[one["adapter"] and adapters[one["adapter"]] for one in asked["asked"]],
    )
    seconds = time.perf_counter() - begun
    texts = [one.outputs[0].text.strip() for one in done]
    return {
        "texts": texts,
        "seconds": seconds,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
    }


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which holds names of its own
    Path(sys.argv[2]).write_text(json.dumps(answer(json.loads(Path(sys.argv[1]).read_text()))))
