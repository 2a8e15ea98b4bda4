"""The grouped update is the formula, token by token."""

from __future__ import annotations

import pytest
import torch

from llava_steering_plugin.vllm.steering_op import steer

WIDTH, SLOTS, RANK, COUNT = 24, 3, 4, 40


def parts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": random(COUNT, WIDTH).to(dtype),
        "residual": random(COUNT, WIDTH).to(dtype),
        # Longer than the batch: what stands behind it is of an older one.
        "slots": torch.randint(-1, SLOTS, (COUNT + 8,), generator=generator),
        "chosen": torch.randint(0, 4, (COUNT + 8,), generator=generator),
        "wanted": torch.tensor([1, 2, 0]),
        "shift": random(SLOTS, RANK, WIDTH),
        "offset": random(SLOTS, RANK),
        "basis": random(SLOTS, RANK, WIDTH),
        "ranks": torch.tensor([4, 2, 1]),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_update_is_the_formula_token_by_token(dtype: torch.dtype) -> None:
    given = parts(dtype)
    hidden, residual = given["hidden"].clone(), given["residual"].clone()
    steered = 0
    for token in range(COUNT):
        slot = int(given["slots"][token])
        if slot < 0 or not int(given["chosen"][token]) & int(given["wanted"][slot]):
            continue
        steered += 1
        rank = int(given["ranks"][slot])
        state = hidden[token] + residual[token]
        inside = given["shift"][slot, :rank] @ state.float() + given["offset"][slot, :rank]
        hidden[token] = state + (given["basis"][slot, :rank].T @ inside).to(dtype)
        residual[token] = 0
    assert 5 < steered < COUNT - 5
    steer(**given)
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.07, "rtol": 0.01}
    torch.testing.assert_close(given["hidden"], hidden, **exact)
    assert torch.equal(given["residual"], residual)


def test_decode_steps_leave_everything_alone() -> None:
    given = parts(torch.float32)
    given["slots"].fill_(-1)
    before = given["hidden"].clone()
    steer(**given)
    assert torch.equal(given["hidden"], before) and given["residual"].any(1).all()
