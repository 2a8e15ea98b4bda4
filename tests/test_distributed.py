"""Parameters are read and written alike whether ZeRO-3 has cut them or not.

Those that are cut need ranks of their own: tests/training/test_deepspeed.py saves, resumes and trains them.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_steering_plugin.distributed import gathered, is_partitioned, whole
from llava_steering_plugin.errors import SteeringError


def test_an_ordinary_parameter_is_not_cut_and_can_be_changed_inside_the_block() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert not is_partitioned(parameter)
    with gathered([parameter], modify=True), torch.no_grad():
        parameter += 1
    assert torch.equal(parameter.data, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_copy_has_the_values_and_the_dtype_and_no_tie_to_the_parameter(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(2, 3).to(dtype))
    copy = whole(parameter)
    assert torch.equal(copy, parameter.data) and copy.dtype == dtype and not copy.requires_grad
    copy.zero_()
    assert parameter.data.any()
    assert whole(parameter, keep=False).numel() == 0


def test_a_shard_alone_is_refused_with_both_shapes() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.ds_shape = torch.Size([2, 3])  # as ZeRO-3 notes the whole shape
    with pytest.raises(SteeringError, match=r"shape \[2, 3\] has shape \[3\] on this rank"):
        whole(parameter)
