"""DeepSpeed's ZeRO on two ranks, on the CPU: sharded weights are saved whole, resumed, and trained as on one rank."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import ranks
import tiny_language_models
import torch
from deepspeed_files import zero
from launching import LAUNCH, launch
from ports import free_port
from rank_runs import (
    CHOICE,
    JOINT,
    MIXLORA,
    MORES,
    ONE_RANK,
    PARITY,
    RESUMABLE,
    TWO_RANKS,
    assert_close,
    assert_equal,
    losses,
    mixed_data,
    resumed_from,
    text_data,
)
from tiny_llava import HIDDEN, LAYERS, TinyLlava
from tiny_towers import build_towers
from training_runs import subprocess_environment, train_flags, train_in_process

from llava_steering_plugin.adapters.attachment import required
from llava_steering_plugin.adapters.stored.folder import ADAPTER
from llava_steering_plugin.adapters.stored.locate import read

QWEN2 = next(family for family in tiny_language_models.FAMILIES if family.name == "qwen2")
OFFLOADED: dict[str, object] = {**RESUMABLE, "bf16": True}


def flags(tiny: TinyLlava, output: Path, settings: Path, overrides: Mapping[str, object]) -> list[str]:
    return train_flags(tiny, output, {"use_cpu": None, "deepspeed": settings, **overrides})


@pytest.fixture(scope="module")
def runs(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs under torchrun, on two ranks and on one."""
    folder, parts = tmp_path_factory.mktemp("deepspeed"), tmp_path_factory.mktemp("parts")
    mixed = {"data_path": mixed_data(tiny, folder)}
    text = {"data_path": text_data(tiny, folder), "max_steps": 2, "group_by_modality_length": False}
    mixlora = {**MIXLORA, "mores_rank": None, "mores_tokens": None, "mores_dropout": None}
    resumable = {2: {**RESUMABLE, **JOINT, "mixlora_dropout": 0.1}, 3: RESUMABLE}
    language_model = tiny_language_models.build(QWEN2, tiny, parts / "qwen2")
    components = {
        "model_name_or_path": language_model,
        "version": QWEN2.version,
        "vision_tower": build_towers(parts / "towers", tiny).siglip,
        "mm_projector_type": "pixel-shuffle",
    }
    two, one = [], []
    for stage in (2, 3):
        settings = zero(folder, stage)
        resumed = resumed_from(folder / f"whole-{stage}", 3, folder / f"resumed-{stage}")
        two += [
            flags(tiny, folder / f"two-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed}),
            flags(tiny, folder / f"mixlora-two-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed, **mixlora}),
            flags(tiny, folder / f"choice-two-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed, **CHOICE}),
            flags(tiny, folder / f"joint-two-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed, **JOINT}),
            flags(tiny, folder / f"components-two-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed, **components}),
            flags(tiny, folder / f"whole-{stage}", settings, resumable[stage]),
            flags(tiny, resumed, settings, resumable[stage]),
            flags(tiny, folder / f"text-{stage}", settings, {**PARITY, **TWO_RANKS, **text}),
            flags(tiny, folder / f"bf16-{stage}", settings, {**PARITY, **TWO_RANKS, **mixed, "bf16": True}),
        ]
        one += [
            flags(tiny, folder / f"one-{stage}", settings, {**PARITY, **ONE_RANK, **mixed}),
            flags(tiny, folder / f"choice-one-{stage}", settings, {**PARITY, **ONE_RANK, **mixed, **CHOICE}),
            flags(tiny, folder / f"mixlora-one-{stage}", settings, {**PARITY, **ONE_RANK, **mixed, **mixlora}),
            flags(tiny, folder / f"joint-one-{stage}", settings, {**PARITY, **ONE_RANK, **mixed, **JOINT}),
            flags(tiny, folder / f"components-one-{stage}", settings, {**PARITY, **ONE_RANK, **mixed, **components}),
        ]
    ungathered = {**MORES, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    two.append(flags(tiny, folder / "ungathered", zero(folder, 3, gather=False), ungathered))
    two.append(flags(tiny, folder / "offload", zero(folder, 3, offload=True), OFFLOADED))
    ended = resumed_from(folder / "whole-3", 6, folder / "ended")
    two.append(flags(tiny, ended, zero(folder, 3), RESUMABLE))
    # Compiling DeepSpeed's operations for the processor takes minutes, once for all runs on this machine.
    ranks.run_on_ranks(two, patched_llava, folder, timeout=600)
    ranks.run_on_ranks(one, patched_llava, folder, ranks=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    "mode",
    ["", "choice-", "mixlora-", "joint-", "components-"],
    ids=["mores", "mores choice", "mixlora", "joint", "Qwen2 with SigLIP and pixel shuffle"],
)
def test_two_ranks_end_where_one_rank_with_accumulation_ends_also_when_one_has_no_image(
    runs: Path, mode: str, stage: int
) -> None:
    # Adam turns the rounding of a gradient that is nearly zero into more than 1e-7: one weight in thousands.
    assert_close(runs / f"{mode}one-{stage}", runs / f"{mode}two-{stage}", atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_three_steps_and_three_after_a_resume_equal_six(runs: Path, stage: int) -> None:
    assert len(losses(runs / f"resumed-{stage}")) == 6
    assert_equal(runs / f"whole-{stage}", runs / f"resumed-{stage}")


@pytest.mark.slow
def test_a_training_whose_last_checkpoint_is_its_end_saves_its_result_and_trains_no_more(runs: Path) -> None:
    assert [path.name for path in (runs / "ended").glob("*checkpoint*")] == ["checkpoint-6"]
    assert_equal(runs / "whole-3", runs / "ended")


@pytest.mark.slow
@pytest.mark.parametrize("run", ["whole-3", "ungathered"])
def test_sharded_parameters_are_saved_whole_whether_or_not_deepspeed_gathers_on_its_own(runs: Path, run: str) -> None:
    checkpoint = max((runs / run).glob("checkpoint-*"))
    for folder in (runs / run, checkpoint):
        stored = read(folder).section(ADAPTER)
        shapes = sorted(tuple(value.shape) for value in stored.values())
        assert shapes == sorted([(2,), (2, HIDDEN), (2, HIDDEN)] * LAYERS)
        assert all(value.any() for name, value in stored.items() if not name.startswith(f"layers.{LAYERS - 1}."))
    # Frozen weights are not in what DeepSpeed writes for a resume: this model is 370,000 parameters large.
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.pt")) < 1_000_000


@pytest.mark.slow
def test_no_adapter_of_any_run_holds_an_empty_tensor(runs: Path) -> None:
    trained = [folder for folder in runs.iterdir() if folder.is_dir()]
    assert len(trained) == 31
    for folder in trained:
        assert not [name for name, value in read(folder).tensors.items() if not value.numel()], folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_batch_without_images_on_every_rank_trains(runs: Path, stage: int) -> None:
    assert len(losses(runs / f"text-{stage}")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_in_bfloat16_the_adapter_is_saved_as_the_engine_holds_it_and_steers_in_float32(runs: Path, stage: int) -> None:
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    path = str(runs / f"bf16-{stage}")
    assert {value.dtype for value in read(path).section(ADAPTER).values()} == {torch.bfloat16}
    model = load_pretrained_model(path, None, get_model_name_from_path(path), device="cpu", device_map="cpu")[1]
    attachment = required(model)
    assert {parameter.dtype for parameter in attachment.parameters().values()} == {torch.float32}
    for layer in attachment.modules.values():
        rotation = layer.vis.basis()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(2), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_deepspeeds_own_launcher_resumes_a_training_with_offloading(
    runs: Path, tiny: TinyLlava, pristine_llava: Path, tmp_path: Path
) -> None:
    output = resumed_from(runs / "offload", 3, tmp_path / "resumed")
    command = [
        *(ranks.script("deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())),
        *("--module", LAUNCH[1], "--cpu", "llava.train.train"),
        *flags(tiny, output, zero(tmp_path, 3, offload=True), OFFLOADED),
    ]
    done = subprocess.run(
        command, env=subprocess_environment(pristine_llava), cwd=tmp_path, text=True, capture_output=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(losses(output)) == 6
    assert_equal(runs / "offload", output)


@pytest.mark.slow
def test_ranks_end_well_though_deepspeed_keeps_their_groups(
    tiny: TinyLlava, patched_llava: Path, tmp_path: Path
) -> None:
    mores = {**MORES, "per_device_train_batch_size": 2}
    training = flags(tiny, tmp_path / "starved", zero(tmp_path, 3), mores)
    ranks.run_on_ranks([training], patched_llava, tmp_path, env=ranks.starved(patched_llava))
    assert (tmp_path / "starved" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "offload", "expected"),
    [
        ({"mm_projector_lr": 1e-5}, True, "--mm_projector_lr with the optimizer of"),
        ({"use_cpu": True}, False, "--use_cpu with --deepspeed"),
        ({"no_cuda": True}, False, "--no_cuda with --deepspeed"),
    ],
)
def test_what_deepspeed_would_ignore_in_silence_is_refused(
    tiny: TinyLlava,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: Mapping[str, object],
    offload: bool,
    expected: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        settings = zero(tmp_path, 3, offload=offload)
        train_in_process(flags(tiny, tmp_path / "run", settings, {**MORES, **overrides}))
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


def test_a_deepspeed_that_needs_more_than_the_processor_is_refused_with_the_version_that_does_not(
    pristine_llava: Path, tmp_path: Path
) -> None:
    # What 0.12.6 does, which upstream pins.
    (tmp_path / "deepspeed").mkdir()
    text = "CPU_Accelerator requires intel_extension_for_pytorch, which is not installed on this system."
    (tmp_path / "deepspeed" / "__init__.py").write_text(f"raise ValueError({text!r})\n")
    env = {"RANK": "0", "PYTHONPATH": f"{tmp_path}:{pristine_llava}"}
    done = launch("--cpu", "llava.train.train", "--deepspeed", "zero3.json", llava=pristine_llava, cwd=tmp_path, **env)
    assert done.returncode == 1
    assert text in done.stderr and "pip install deepspeed==0.19.8" in done.stderr
    assert "Traceback" not in done.stderr
