"""MoReS: the numbers of the authors' code, the tokens and layers that change, and the check of its settings."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from steered import away_from_identity
from transformers import LlamaForCausalLM

from llava_steering_plugin import attach, token_map
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, LayerShape
from llava_steering_plugin.modes.mores import MoReS, Steering

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def decoder(width: int, layers: int = 1) -> DecoderShape:
    return DecoderShape(width, tuple(LayerShape(f"layers.{number}", {}) for number in range(layers)))


def a_pass(visual: list[list[int]], *, attention: list[list[int]] | None = None, decode: bool = False) -> ForwardPass:
    seen = torch.tensor(visual, dtype=torch.bool)
    present = torch.ones_like(seen) if attention is None else torch.tensor(attention, dtype=torch.bool)
    return ForwardPass(seen, present & ~seen, present, decode, {})


# The authors' code, run on random weights


@pytest.fixture(scope="module")
def golden_base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(GOLDEN / "mores_base", attn_implementation="eager").eval()


@pytest.mark.parametrize("attention", [True, False], ids=["mask given", "no mask"])
def test_the_released_codes_weights_give_its_logits(golden_base: LlamaForCausalLM, attention: bool) -> None:
    golden = load_file(GOLDEN / "mores_released_io.safetensors")
    embeds = golden["inputs_embeds"]
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    start = int(golden["visual_start"])
    visual[:, start : start + int(golden["visual_len"])] = True
    attachment = attach(golden_base, MoReS(rank=2, tokens="f4+l5"))
    try:
        for number, module in enumerate(attachment.modules.values()):
            parts = (golden[f"layer{number}.{name}"] for name in "RWb")
            rotation, weight, offset = parts
            module.get_submodule("vis").set_paper_weights(rotation.T, weight, offset)
        with torch.no_grad(), token_map(visual, torch.ones_like(visual) if attention else None):
            steered = golden_base(inputs_embeds=embeds).logits
    finally:
        attachment.remove()
    with torch.no_grad():
        frozen = golden_base(inputs_embeds=embeds).logits
    assert (golden["logits"] - golden["base_logits"]).abs().max() > 1e-2, "the golden data would show nothing"
    torch.testing.assert_close(frozen, golden["base_logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(steered, golden["logits"], atol=1e-5, rtol=0)


# Identity at initialisation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"rank": 4, "tokens": "all"}, {"modality": "vis+text", "dropout": 0.5}])
def test_a_fresh_adapter_changes_no_bit(settings: dict[str, object], dtype: torch.dtype) -> None:
    (module,) = MoReS(**settings).build(decoder(32)).values()
    hidden = torch.randn(2, 9, 32).to(dtype)
    step = a_pass([[0, 1, 1, 1, 1, 0, 0, 0, 0], [0] * 9])
    assert torch.equal(module(hidden, hidden, step), hidden)


# Size


@pytest.mark.parametrize(
    ("width", "layers", "rank", "expected"),
    [
        pytest.param(2560, 32, 1, 163_872, id="Phi-2, rank 1"),
        pytest.param(2560, 32, 2, 327_744, id="Phi-2, rank 2"),
        pytest.param(2560, 32, 4, 655_488, id="Phi-2, rank 4"),
        pytest.param(4096, 32, 1, 262_176, id="7B"),
        pytest.param(5120, 40, 1, 409_640, id="13B"),
    ],
)
def test_parameter_counts_are_the_papers(width: int, layers: int, rank: int, expected: int) -> None:
    with torch.device("meta"):
        modules = MoReS(rank=rank).build(decoder(width, layers))
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    assert sum(parameter.numel() for parameter in parameters) == expected
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


# Which hidden states change


def steered(settings: dict[str, object], step: ForwardPass, hidden: torch.Tensor) -> torch.Tensor:
    (module,) = MoReS(**settings).build(decoder(hidden.shape[-1])).values()
    away_from_identity(module)
    return module(hidden, hidden, step)


def changed(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
    return [
        [int(not torch.equal(a, b)) for a, b in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)
    ]


IMAGE_THEN_TEXT = [[0, 1, 1, 1, 1, 0, 0, 0], [0] * 8]
PADDED = [[1] * 7 + [0], [1] * 8]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tokens": "all"}, [[0, 1, 1, 1, 1, 0, 0, 0], [0] * 8]),
        ({"tokens": "f1+l1"}, [[0, 1, 0, 0, 1, 0, 0, 0], [0] * 8]),
        ({"tokens": "1%"}, [[0, 0, 0, 1, 0, 0, 0, 0], [0] * 8]),
        # Text of one row is one run, on both sides of its image; padding and text-only rows stay out.
        ({"tokens": "all", "modality": "text"}, [[1, 0, 0, 0, 0, 1, 1, 0], [0] * 8]),
        ({"tokens": "f2+l1", "modality": "text"}, [[1, 0, 0, 0, 0, 1, 1, 0], [0] * 8]),
        ({"tokens": "f1", "modality": "vis+text"}, [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]),
    ],
)
def test_only_selected_tokens_of_the_chosen_modality_change(
    settings: dict[str, object], expected: list[list[int]]
) -> None:
    hidden = torch.randn(2, 8, 16)
    assert changed(hidden, steered(settings, a_pass(IMAGE_THEN_TEXT, attention=PADDED), hidden)) == expected


def test_text_is_steered_in_the_prompt_only_because_answers_are_not_steered_while_they_are_decoded() -> None:
    hidden = torch.randn(1, 6, 16)
    step = a_pass([[0, 1, 1, 0, 0, 0]])
    step.prompt = torch.tensor([[1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    assert changed(hidden, steered({"tokens": "all", "modality": "text"}, step, hidden)) == [[1, 0, 0, 1, 0, 0]]


def test_images_and_text_have_weights_of_their_own() -> None:
    (module,) = MoReS(modality="vis+text", tokens="all").build(decoder(16)).values()
    names = {name for name, _ in module.named_parameters()}
    parts = ("steer_basis", "steer_shift", "steer_offset")
    assert names == {f"{kind}.{part}" for kind, part in itertools.product(("vis", "text"), parts)}


@pytest.mark.parametrize("modality", ["vis", "text", "vis+text"])
def test_rows_without_images_are_untouched_and_still_give_every_parameter_a_gradient(modality: str) -> None:
    (module,) = MoReS(rank=3, modality=modality, dropout=0.1).build(decoder(16)).values()
    away_from_identity(module)
    hidden = torch.randn(2, 5, 16, requires_grad=True)
    output = module(hidden, hidden, a_pass([[0] * 5, [0] * 5]))
    assert torch.equal(output, hidden)
    output.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert torch.equal(hidden.grad, 2 * hidden)


def test_decode_steps_cost_nothing() -> None:
    (module,) = MoReS().build(decoder(16)).values()
    away_from_identity(module)
    hidden = torch.randn(3, 1, 16)
    assert module(hidden, hidden, a_pass([[0]] * 3, decode=True)) is hidden


def test_dropout_falls_on_the_update_and_only_while_training() -> None:
    steering = Steering(256, 2, dropout=0.5)
    away_from_identity(steering)
    hidden = torch.randn(4, 256)
    full = steering.eval()(hidden)
    torch.testing.assert_close(steering.eval()(hidden), full, atol=0, rtol=0)
    dropped = steering.train()(hidden)
    zero = dropped == 0
    assert 0.3 < zero.float().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], 2 * full[~zero])

    (module,) = MoReS(dropout=0.9, tokens="all").build(decoder(256)).values()
    module.train()
    away_from_identity(module)
    rows = hidden[None]
    output = module(rows, rows, a_pass([[1, 1, 0, 0]]))
    assert torch.equal(output[0, 2:], rows[0, 2:])
    kept = output[0, :2] == rows[0, :2]
    assert 0.8 < kept.float().mean() < 1, "where the update is dropped, the hidden state itself stays"


# Settings


def test_every_bad_setting_is_named() -> None:
    mode = MoReS(rank=0, tokens="f0", modality="audio", layers="7-3", dropout=1.0)
    problems = "\n".join(mode.problems(decoder(64, 4)))
    for flag in ("mores_rank", "mores_tokens", "mores_modality", "mores_layers", "mores_dropout"):
        assert flag in problems
    assert len(mode.problems()) == 5


def test_a_rank_above_the_width_and_layers_beyond_the_last_are_refused_on_the_model(
    golden_base: LlamaForCausalLM,
) -> None:
    with pytest.raises(ArgumentsError) as error:
        attach(golden_base, "mores", rank=65, layers="0-3")
    assert "width of 64" in str(error.value)
    assert "layer 2, the last of 3" in str(error.value)
    assert not hasattr(golden_base, "llava_steering")


def test_only_the_chosen_layers_get_a_module() -> None:
    assert list(MoReS(layers="every:2").build(decoder(8, 5))) == ["layers.0", "layers.2", "layers.4"]
    assert list(MoReS(layers="3,0-1").build(decoder(8, 5))) == ["layers.0", "layers.1", "layers.3"]


@pytest.mark.parametrize(
    ("tokens", "image", "steered"),
    [
        ("1%", 16, 1),
        ("1%", 144, 1),
        ("1%", 256, 3),
        ("1%", 549, 5),
        ("0.5%", 576, 3),
        ("10%", 49, 5),
        ("f4+1%", 144, 5),
        ("1%", 550, None),
        ("1%", 576, None),
        ("f4+l5+1%", 144, None),
        ("25%", 24, None),
        *((spec, 16, None) for spec in ("all", "f4", "l5", "uniform3")),
    ],
)
def test_a_percentage_that_comes_to_fewer_than_six_tokens_is_remarked_on(
    tokens: str, image: int, steered: int | None
) -> None:
    """The paper's 1% are 6 of 576 tokens; who names a number means it."""
    remarks = MoReS(tokens=tokens).remarks(image)
    assert len(remarks) == (steered is not None)
    for remark in remarks:
        assert f"--mores_tokens {tokens} steers only {steered} of the {image} tokens of an image" in remark
        assert "uniform6" in remark


def test_nothing_is_remarked_where_images_are_not_steered() -> None:
    assert MoReS(modality="text").remarks(16) == []
    assert MoReS(modality="vis+text").remarks(16) != []
