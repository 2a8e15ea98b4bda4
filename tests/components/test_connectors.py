"""Each connector gives the tokens that it says, trains all its parameters, and does what its paper does.

Covers all files of `components/connectors/`: `components/connectors/average_pool.py`,
`components/connectors/mlp.py`, `components/connectors/mof_mlp.py`, `components/connectors/pixel_shuffle.py`,
`components/connectors/qformer.py`, `components/connectors/resampler.py`, `components/connectors/squares.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_steering_plugin.components.base import Connector, ImageTokens
from llava_steering_plugin.components.connectors.average_pool import AveragePool
from llava_steering_plugin.components.connectors.mof_mlp import MofMlp
from llava_steering_plugin.components.connectors.pixel_shuffle import PixelShuffle
from llava_steering_plugin.components.connectors.qformer import QFormer
from llava_steering_plugin.components.connectors.resampler import Resampler

SQUARES = ImageTokens(16, 12, 4, parts=(8, 4))
WIDTH = 24
SMALL = [
    AveragePool(2),
    PixelShuffle(2),
    PixelShuffle(4),
    MofMlp(),
    QFormer(queries=5, layers=3, hidden=16, heads=2),
    Resampler(queries=6, layers=2, heads=2, head_width=8),
]


def named(connectors: list[Any]) -> dict[str, Any]:
    return {"argvalues": connectors, "ids": [str(each) for each in connectors]}


@pytest.mark.parametrize("connector", **named(SMALL))
def test_it_gives_the_tokens_that_it_says_and_trains_every_parameter(connector: Connector) -> None:
    module = connector.build(SQUARES, WIDTH)
    given = connector.tokens(SQUARES, WIDTH)
    made = module(torch.randn(2, SQUARES.count, SQUARES.width))
    assert made.shape == (2, given.count, given.width) and given.width == WIDTH
    made.square().sum().backward()
    untrained = [name for name, value in module.named_parameters() if value.grad is None or not value.grad.any()]
    # Softmax takes no notice of what a key's bias adds to all of a row.
    assert [name for name in untrained if not name.endswith("key.bias")] == []
    assert connector.problems(SQUARES, WIDTH) == []


@pytest.mark.parametrize("connector", **named(SMALL))
def test_it_is_built_on_the_meta_device_with_names_that_llava_takes(connector: Connector) -> None:
    with torch.device("meta"):
        module = connector.build(SQUARES, WIDTH)
    real = connector.build(SQUARES, WIDTH)
    assert {name: value.shape for name, value in module.named_parameters()} == {
        name: value.shape for name, value in real.named_parameters()
    }
    words = ("lora_", "mm_projector", "gamma", "beta")
    assert not [name for name in real.state_dict() if any(word in name for word in words)]
    assert real.state_dict().keys() == dict(real.named_parameters()).keys(), "buffers would not be saved"


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    features = torch.randn(3, SQUARES.count, SQUARES.width)
    for connector in SMALL:
        module = connector.build(SQUARES, WIDTH).eval()
        torch.testing.assert_close(module(features)[1:2], module(features[1:2]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("connector", **named(SMALL))
def test_features_may_have_another_dtype_than_the_weights(connector: Connector, weights: torch.dtype) -> None:
    """Upstream's trainings have the tower's features in float32, and a base's own connector in bfloat16."""
    module = connector.build(SQUARES, WIDTH).to(weights)
    features = torch.randn(2, SQUARES.count, SQUARES.width)
    with torch.autocast("cpu", torch.bfloat16):
        module(features).float().sum().backward()
    assert module(features.to(weights)).dtype == weights


def numbered(width: int) -> Tensor:
    """Tokens that hold their row and column: [1, 16, width], the first feature row * 10 + column."""
    places = torch.arange(4)
    tokens = torch.zeros(1, 16, width)
    tokens[0, :, 0] = (places[:, None] * 10 + places).flatten()
    return tokens


def without_mlp(module: nn.Module) -> nn.Module:
    module.mlp = nn.Identity()
    return module


def test_pooling_takes_the_mean_of_four_neighbours() -> None:
    module = without_mlp(AveragePool(2).build(ImageTokens(16, 1, 4), 1))
    assert module(numbered(1)).flatten().tolist() == [5.5, 7.5, 25.5, 27.5]


def test_pixel_shuffle_puts_four_neighbours_side_by_side() -> None:
    module: Any = without_mlp(PixelShuffle(2).build(ImageTokens(16, 1, 4), 1))
    joined: list[Tensor] = []
    module.norm.register_forward_pre_hook(lambda norm, given: joined.append(given[0]))
    module(numbered(1))
    assert joined[0][0].tolist() == [[0, 1, 10, 11], [2, 3, 12, 13], [20, 21, 30, 31], [22, 23, 32, 33]]


def test_mof_projects_each_tower_and_takes_turns() -> None:
    module: Any = MofMlp().build(SQUARES, WIDTH)
    features = torch.randn(1, 16, 12)
    made = module(features)
    torch.testing.assert_close(made[:, 0::2], module.mlps[0](features[..., :8]))
    torch.testing.assert_close(made[:, 1::2], module.mlps[1](features[..., 8:]))
    assert MofMlp().tokens(SQUARES, WIDTH).side is None, "two tokens stand for each place"


@pytest.mark.parametrize(
    ("connector", "tokens", "said"),
    [
        (AveragePool(3), SQUARES, "factor is 3, and the tower gives 4 x 4 tokens"),
        (AveragePool(0), SQUARES, "factor is 0; it must be at least 1"),
        (PixelShuffle(2), ImageTokens(17, 12, 4, 1), "--mm_vision_select_feature patch"),
        (PixelShuffle(2), ImageTokens(5, 12), "the 5 tokens of this tower are no squares"),
        (MofMlp(), ImageTokens(16, 12, 4), "give --vision_tower mof:CLIP"),
        (QFormer(hidden=10, heads=3), SQUARES, "hidden is 10, which 3 heads do not divide"),
        (QFormer(queries=0), SQUARES, "queries is 0"),
        (Resampler(layers=0), SQUARES, "layers is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_said(connector: Connector, tokens: ImageTokens, said: str) -> None:
    (problem,) = connector.problems(tokens, WIDTH)
    assert said in problem
