"""The memory that `llava-steering plan` predicts: exact where it can be, otherwise from a step on the meta device.

Covers `planning/sharding.py`, `planning/from_flags.py`, `planning/meta_step.py`, `planning/meta_memory.py`,
`planning/report.py` and `planning/gpus.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from quantising import quantising_on_cpu
from tiny_llava import TinyLlava
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_runs import plain_llm_overrides, train_flags, train_in_process
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.gpus import named_gpu
from llava_steering_plugin.planning.meta_memory import META, LiveBytes, as_on_a_gpu
from llava_steering_plugin.planning.meta_step import (
    Arithmetic,
    BatchShape,
    TrainingSetup,
    assemble,
    peak_of_step,
    peaks,
)
from llava_steering_plugin.planning.plan import plan
from llava_steering_plugin.planning.sharding import Memory, Sharding, StoredTensor, memory_of

SMALL = {
    "model_type": "llava_llama",
    "hidden_size": 64,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
}
FLOAT = Arithmetic(torch.float32, None, torch.float32, torch.float32, torch.float32)
ZERO_2 = {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"}}
OFFLOADED = {
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
}


@pytest.fixture(scope="module", autouse=True)
def needs_llava(llava_copies: object) -> None:
    """Plans ask LLaVA for its flags."""


def bytes_of(model: Any) -> dict[str, int]:
    """What really lies in memory of a model that was trained, by part."""
    found: dict[str, int] = {}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        part = "vision tower" if "vision_tower" in name else "projector" if "mm_projector" in name else "language model"
        part = "adapter" if ".steering." in name else part
        found[part] = found.get(part, 0) + tensor.nbytes
    for module in model.modules():
        found["language model"] += _constants(module)
    return found


def _constants(module: Any) -> int:
    """bitsandbytes' scales beside a packed weight."""
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        state = module.weight.quant_state
        made = [state.absmax, state.code]
        made += [state.state2.absmax, state.offset] if state.nested else []
        return sum(tensor.nbytes for tensor in made)
    return int(module.state.SCB.nbytes) if isinstance(module, bitsandbytes.nn.Linear8bitLt) else 0


@pytest.mark.parametrize(
    "overrides",
    [
        {"tuning_mode": "mores", "mores_modality": "vis+text"},
        {"tuning_mode": "mixlora", "bf16": False, "freeze_mm_mlp_adapter": True},
        {"tuning_mode": "mores", "bits": 4},
        pytest.param(
            {"tuning_mode": "mixlora", "bits": 4, "double_quant": False, "bf16": False}, marks=pytest.mark.slow
        ),
        pytest.param({"tuning_mode": "mores", "bits": 8}, marks=pytest.mark.slow),
    ],
    ids=["MoReS over a plain LLM", "MixLoRA in fp32", "MoReS over nf4", "MixLoRA over nf4 in fp32", "8 bits"],
)
def test_weights_gradients_and_optimizer_are_exactly_those_of_the_real_training(
    tiny: TinyLlava, tmp_path: Path, patched_llava: Path, overrides: Mapping[str, object]
) -> None:
    from llava_steering_plugin.training import trainer

    plain = plain_llm_overrides(tiny) if "bits" not in overrides and "bf16" not in overrides else {}
    flags = train_flags(tiny, tmp_path / "run", {**plain, **overrides, "max_steps": 1})
    models, real = [], []

    def after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
        states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
        real.append((gradients, sum(state.nbytes for state in states)))

    save = trainer.save_adapter
    hook = register_optimizer_step_post_hook(after_step)
    try:
        with pytest.MonkeyPatch.context() as patched, quantising_on_cpu():
            patched.setattr(
                trainer, "save_adapter", lambda model, *a, **k: (models.append(model), save(model, *a, **k))
            )
            train_in_process(flags)
    finally:
        hook.remove()

    made = plan(flags, Wanted()).memory
    assert made is not None
    predicted = made.shardings[made.chosen]
    assert (predicted.gradients, predicted.optimizer) == real[0]
    assert predicted.weights == bytes_of(models[-1])


@pytest.mark.parametrize(
    "mode",
    [MoReS(rank=2, tokens="all"), pytest.param(MixLoRA(), marks=pytest.mark.slow)],
    ids=["mores", "mixlora"],
)
@pytest.mark.parametrize(("checkpointing", "samples"), [(True, 1), (True, 4), (False, 4)])
def test_two_short_models_say_what_a_deep_one_needs(mode: Any, checkpointing: bool, samples: int) -> None:
    setup = TrainingSetup(SMALL, "small", mode)
    batch = BatchShape(samples, 48, 16, checkpointing, False, False)
    meta = assemble(setup, FLOAT, batch)

    extrapolated = peak_of_step(setup, FLOAT, batch, meta)

    assert extrapolated == pytest.approx(max(peaks(meta, FLOAT, batch).values()), rel=0.01)


def test_a_step_keeps_what_it_must_and_recomputing_saves_most_of_it() -> None:
    setup, tokens = TrainingSetup(SMALL, "small", MoReS()), 4 * 48
    needed = {}
    for checkpointing in (True, False):
        batch = BatchShape(4, 48, 16, checkpointing, False, False)
        needed[checkpointing] = peak_of_step(setup, FLOAT, batch, assemble(setup, FLOAT, batch))

    logits, hidden = tokens * 500 * 4, tokens * 64 * 4
    # Logits, a shifted copy and their log-softmax are there together; every layer keeps its input.
    assert needed[True] > 3 * logits * 47 / 48 + 9 * hidden
    # Without recomputing a layer keeps at least the three wide tensors of its MLP and queries, keys and values.
    assert needed[False] > 3 * logits * 47 / 48 + 9 * tokens * 4 * (3 * 128 + 3 * 64)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_model_may_switch_autocast_off_on_its_own_device(autocast: torch.dtype | None) -> None:
    """As Llama does since transformers 4.38, and with it LLaVA-NeXT: torch has no autocast on the meta device."""
    original, linear = torch.autocast, torch.nn.Linear(4, 4, device=META)
    hidden = torch.empty(2, 4, device=META)
    with as_on_a_gpu(autocast):
        assert linear(hidden).dtype == (autocast or torch.float32)
        with torch.autocast(device_type="meta", enabled=False):
            assert linear(hidden).dtype == torch.float32
        assert linear(hidden).dtype == (autocast or torch.float32)
    assert torch.autocast is original


@pytest.mark.parametrize("checkpointing", [True, False])
def test_no_pass_keeps_a_matrix_of_attention_scores(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the forward nor, under checkpointing, the one that is computed again in the backward."""
    seen: list[tuple[int, ...]] = []
    look = LiveBytes._see
    monkeypatch.setattr(LiveBytes, "_see", lambda self, tensor: (seen.append(tuple(tensor.shape)), look(self, tensor)))
    setup, batch = TrainingSetup(SMALL, "small", MoReS()), BatchShape(2, 46, 16, checkpointing, False, False)
    peaks(assemble(setup, FLOAT, batch, 3), FLOAT, batch)
    assert (2, 46, 64) in seen
    assert (2, 4, 46, 46) not in seen


def test_layers_that_differ_are_all_rehearsed() -> None:
    setup = TrainingSetup(SMALL, "small", MixLoRA(start_layer=8))
    batch = BatchShape(1, 48, 16, True, False, False)
    meta = assemble(setup, FLOAT, batch)
    found = peak_of_step(setup, FLOAT, batch, meta)
    # The second rehearsal knows which linears are called on one tensor, and holds some bytes less or more.
    assert found == pytest.approx(max(peaks(meta, FLOAT, batch).values()), rel=1e-3)


def test_zero_cuts_what_it_says_and_offloading_moves_it_to_the_host() -> None:
    tensors = [StoredTensor("language model", 1000, 2000, 2, False), StoredTensor("adapter", 100, 200, 2, True)]

    def under(sharding: Sharding) -> Memory:
        return memory_of(tensors, 500, "adamw_torch", 3, sharding)

    alone, ddp = under(Sharding()), under(Sharding(world=4))
    assert alone == Memory({"language model": 2000, "adapter": 200}, 200, 400, 0, 300)
    assert ddp.buffers == 200 and ddp.total == alone.total + 200
    one, two = under(Sharding(1, 4, bucket=50)), under(Sharding(2, 4, bucket=50))
    assert (one.gradients, one.optimizer) == (200, two.optimizer)
    assert (two.gradients, two.optimizer, two.buffers) == (50, 100 * 12 // 4, 50 * 2 * 2)
    assert two.weights == alone.weights
    three = under(Sharding(3, 4, bucket=50, live=600, persistent=100))
    assert three.weights == {"language model": 500, "adapter": 200}
    assert three.buffers == 50 * 2 * 2 + 600 * 2
    offloaded = under(Sharding(3, 4, True, True, bucket=50, live=600, persistent=100))
    assert offloaded.weights == {"language model": 0, "adapter": 200}
    assert (offloaded.gradients, offloaded.optimizer) == (0, 0)
    assert offloaded.host == 500 + 300 + 100


@pytest.mark.parametrize(("settings", "name"), [(None, "DDP"), (ZERO_2, "ZeRO-2"), (OFFLOADED, "ZeRO-3 offload")])
def test_the_deepspeed_file_decides_and_the_other_shardings_are_there_to_compare(
    tiny: TinyLlava, tmp_path: Path, settings: dict[str, Any] | None, name: str
) -> None:
    overrides: dict[str, object] = {"tuning_mode": "mores", "use_cpu": None}
    if settings is not None:
        overrides["deepspeed"] = tmp_path / "zero.json"
        (tmp_path / "zero.json").write_text(json.dumps(settings))

    made = plan(train_flags(tiny, tmp_path, overrides), Wanted(gpus=2)).memory

    assert made is not None and made.chosen == name
    assert set(made.shardings) == {"DDP", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"}
    totals = {option: of.total - of.buffers for option, of in made.shardings.items()}
    assert totals["ZeRO-2"] > totals["ZeRO-3"] > totals["ZeRO-3 offload"]


def test_four_bits_are_not_planned_under_zero_3(tiny: TinyLlava, tmp_path: Path) -> None:
    made = plan(train_flags(tiny, tmp_path, {"tuning_mode": "mores", "bits": 4}), Wanted()).memory
    assert made is not None and set(made.shardings) == {"no ZeRO", "ZeRO-2"}


def test_a_longer_sequence_and_a_larger_batch_need_more(tiny: TinyLlava, tmp_path: Path) -> None:
    def total(sequence: int, batch: int) -> int:
        flags = train_flags(tiny, tmp_path, {"tuning_mode": "mores", "per_device_train_batch_size": batch})
        made = plan(flags, Wanted(sequence=sequence)).memory
        assert made is not None and made.assumed["sequence"] == sequence
        return made.shardings[made.chosen].activations

    assert total(64, 2) < total(128, 2) < total(128, 8)


@pytest.mark.parametrize(("text", "gib"), [("A100-80GB", 79), ("a100-80", 79), ("rtx 4090", 23), ("15.5", 15.5)])
def test_a_gpu_is_a_name_or_a_number(text: str, gib: float) -> None:
    assert named_gpu(text).size == gib * 2**30


@pytest.mark.parametrize("text", ["A101", "0", "-3", "nan", "inf"])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ArgumentsError, match="A100-80GB"):
        named_gpu(text)


def test_whats_wrong_with_the_plans_own_flags_is_said_with_the_rest(tiny: TinyLlava, tmp_path: Path) -> None:
    flags = train_flags(tiny, tmp_path, {"tuning_mode": "mores", "mores_rank": 0, "deepspeed": "no-such.json"})
    made = plan(flags, Wanted(gpu="A101", gpus=0, sequence=1))
    said = "\n".join(made.problems)
    for part in ("--gpu A101", "--gpus is 0", "--sequence is 1", "--mores_rank is 0", "no-such.json: there is no such"):
        assert part in said
    assert made.memory is None


def test_the_command_says_whether_it_fits_in_a_table_and_as_json(tiny: TinyLlava, tmp_path: Path) -> None:
    words = ["plan", "--gpu", "0.001", *train_flags(tiny, tmp_path, {"tuning_mode": "mores"})]

    shown, listed = CliRunner().invoke(app, words), CliRunner().invoke(app, [*words, "--json"])

    assert shown.exit_code == 0, shown.output
    assert "these flags" in shown.stdout and "activations" in shown.stdout and "NO, " in shown.stdout
    made = json.loads(listed.stdout)["memory"]
    assert made["chosen"] == "no ZeRO" and made["per_gpu"]["no ZeRO"]["fits"] is False
    of = made["per_gpu"]["no ZeRO"]
    parts = of["gradients"] + of["optimizer"] + of["buffers"] + of["activations"] + sum(of["weights"].values())
    assert of["total"] == parts
