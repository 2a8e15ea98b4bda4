"""Several processes without DeepSpeed: torchrun and gloo here, NCCL on GPUs. Plain DDP works, FSDP is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
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
)
from tiny_llava import TinyLlava
from training_runs import train_flags, train_in_process

from llava_steering_plugin.training.saving.notes import gathered_in


@pytest.fixture(scope="module")
def ddp(tiny: TinyLlava, patched_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs on two ranks, and `one-rank` in this process."""
    folder = tmp_path_factory.mktemp("ddp")
    mixed = {"data_path": mixed_data(tiny, folder)}
    mixlora = {**PARITY, **MIXLORA, "mores_rank": None, "mores_tokens": None}
    mixlora |= {"mixlora_balance": 1.0, "save_strategy": "steps", "save_steps": 5}
    joint, resumable = {**PARITY, **JOINT, "mixlora_balance": 1.0}, {**RESUMABLE, **JOINT, "mixlora_dropout": 0.1}
    ranks.run_on_ranks(
        [
            train_flags(tiny, folder / "two-ranks", {**PARITY, **TWO_RANKS, **mixed}),
            train_flags(tiny, folder / "mixlora-two-ranks", {**mixlora, **TWO_RANKS, **mixed}),
            train_flags(tiny, folder / "choice-two-ranks", {**PARITY, **CHOICE, **TWO_RANKS, **mixed}),
            train_flags(tiny, folder / "joint-two-ranks", {**joint, **TWO_RANKS, **mixed}),
            train_flags(tiny, folder / "whole", RESUMABLE),
            train_flags(tiny, resumed_from(folder / "whole", 3, folder / "resumed"), RESUMABLE),
            train_flags(tiny, folder / "joint-whole", resumable),
            train_flags(tiny, resumed_from(folder / "joint-whole", 3, folder / "joint-resumed"), resumable),
        ],
        patched_llava,
        folder,
    )
    train_in_process(train_flags(tiny, folder / "one-rank", {**PARITY, **ONE_RANK, **mixed}))
    train_in_process(train_flags(tiny, folder / "choice-one-rank", {**PARITY, **CHOICE, **ONE_RANK, **mixed}))
    train_in_process(train_flags(tiny, folder / "mixlora-one-rank", {**mixlora, **ONE_RANK, **mixed}))
    train_in_process(train_flags(tiny, folder / "joint-one-rank", {**joint, **ONE_RANK, **mixed}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["", "choice-", "mixlora-", "joint-"], ids=["mores", "mores choice", "mixlora", "joint"]
)
def test_two_ranks_end_where_one_rank_with_accumulation_ends_also_when_one_has_no_image(ddp: Path, mode: str) -> None:
    assert_close(ddp / f"{mode}one-rank", ddp / f"{mode}two-ranks")


@pytest.mark.slow
def test_routers_are_balanced_over_the_choices_of_both_ranks(ddp: Path) -> None:
    of_one, of_two = (gathered_in(ddp / f"mixlora-{ranks}" / "checkpoint-5") for ranks in ("one-rank", "two-ranks"))
    assert of_one and of_one == of_two
    # A row chose four factors: with one row a rank, a share of an eighth has been chosen on one rank alone.
    of_routers = [shares for name, shares in of_two.items() if name != "together"]
    assert {share for shares in of_routers for share in shares} == {0.0, 0.125, 0.25}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["", "joint-"], ids=["mores", "joint"])
def test_two_ranks_resume_bit_equal(ddp: Path, mode: str) -> None:
    assert len(losses(ddp / f"{mode}resumed")) == 6
    assert_equal(ddp / f"{mode}whole", ddp / f"{mode}resumed")


@pytest.mark.slow
def test_two_ranks_write_one_adapter_and_the_random_states_of_both(ddp: Path) -> None:
    assert {path.name for path in (ddp / "whole" / "checkpoint-6").iterdir()} == {
        "adapter_model.safetensors",
        "llava_steering_config.json",
        "config.json",
        "README.md",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "steering_state.json",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


@pytest.mark.parametrize("fsdp", ["full_shard", "full_shard auto_wrap"])
def test_fsdp_is_refused_with_the_reason_before_a_model_is_loaded(
    tiny: TinyLlava, tmp_path: Path, capsys: pytest.CaptureFixture[str], fsdp: str
) -> None:
    flags = {**MORES, "model_name_or_path": tmp_path / "nothing-here", "fsdp": fsdp}
    with pytest.raises(SystemExit) as stopped:
        train_in_process(train_flags(tiny, tmp_path / "run", flags))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "--fsdp cannot be combined with a tuning mode" in error
    assert "use DeepSpeed ZeRO or plain DDP" in error
