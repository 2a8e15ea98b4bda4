"""Layers that learn which tokens they steer: what they compute, how the choice learns, and what a bad list is told."""

from __future__ import annotations

import itertools

import pytest
import torch
from steered import away_from_identity
from torch import Tensor

from llava_steering_plugin.modes.base import DecoderShape, ForwardPass, LayerShape
from llava_steering_plugin.modes.mores import MoReS, SteeredLayer
from llava_steering_plugin.modes.mores_choice import TokenChoice, best
from llava_steering_plugin.modes.mores_selection import MANY, parse_choices

WIDTH, TOKENS = 16, "f1,l2,uniform3,all"
VISUAL = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0] * 7]).bool()
EACH = range(len(TOKENS.split(",")))


def a_pass(visual: Tensor = VISUAL) -> ForwardPass:
    return ForwardPass(visual, ~visual, torch.ones_like(visual), False, {})


def layer(tokens: str = TOKENS, seed: int = 0, **settings: object) -> SteeredLayer:
    """A layer away from the identity, with the weights of every other one of this seed; in training mode."""
    torch.manual_seed(seed)
    (made,) = (
        MoReS(rank=2, tokens=tokens, **settings).build(DecoderShape(WIDTH, (LayerShape("layers.0", {}),))).values()
    )
    assert isinstance(made, SteeredLayer)
    for modality in ("vis", "text"):
        if modality in dict(made.named_children()):
            away_from_identity(made.get_submodule(modality))
    return made


def choice_of(made: SteeredLayer, modality: str = "vis") -> TokenChoice:
    choice = made.choice(modality)
    assert choice is not None
    return choice


def choose(made: SteeredLayer, number: int) -> None:
    with torch.no_grad():
        choice_of(made).steer_scores.zero_()[number] = 0.5


@pytest.mark.parametrize("number", EACH)
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_steers_the_tokens_of_its_choice_as_if_no_other_had_been_offered(number: int, training: bool) -> None:
    hidden = torch.randn(3, 7, WIDTH)
    made, alone = layer().train(training), layer(TOKENS.split(",")[number])
    choose(made, number)
    with torch.no_grad():
        ours, expected = (each(hidden, hidden, a_pass()) for each in (made, alone))
    # In training the products are over the tokens of all selections, which rounds differently.
    torch.testing.assert_close(ours, expected, atol=1e-5 if training else 0, rtol=0)
    assert torch.equal((ours != hidden).any(-1), (expected != hidden).any(-1)), "other tokens keep every bit"


@pytest.mark.parametrize("number", EACH)
def test_the_gradients_are_those_of_the_chosen_tokens_and_the_scores_learn_what_each_selection_would_add(
    number: int,
) -> None:
    """Against a naive loop over tokens: the weight of a token is the probability that its selection is chosen."""
    hidden, weights = torch.randn(3, 7, WIDTH), torch.randn(3, 7, WIDTH)
    made, alone = layer(), layer(TOKENS.split(",")[number])
    choose(made, number)
    for each in (made, alone):
        (each(hidden, hidden, a_pass()).tanh() * weights).sum().backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(made.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)

    scores = choice_of(made).steer_scores
    steering = made.get_submodule("vis")
    steered = made(hidden, hidden, a_pass()).detach()
    slope = weights * (1 - steered.tanh().square())
    probabilities = scores.detach().clone().requires_grad_()
    expected = torch.zeros(())
    for row, place in itertools.product(range(3), range(7)):
        sharing = torch.tensor([bool(each.mask(VISUAL)[row, place]) for each in parse_choices(TOKENS)])
        update = steering(hidden[row, place][None])[0].detach()
        expected = expected + (probabilities.softmax(0) * sharing).sum() * (slope[row, place] @ update)
    (wanted,) = torch.autograd.grad(expected, probabilities)
    torch.testing.assert_close(scores.grad, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("right", EACH)
@pytest.mark.parametrize("order", [1, -1])
def test_a_layer_finds_the_tokens_that_have_to_be_steered_wherever_it_begins(right: int, order: int) -> None:
    """The update is the same for all tokens; the loss wants it on those of one selection alone."""
    specs = TOKENS.split(",")[::order]
    right = right if order == 1 else len(specs) - 1 - right
    made = layer(",".join(specs), seed=1)
    shift = torch.randn(WIDTH)
    wanted = parse_choices(specs[right])[0].mask(VISUAL)[..., None] * shift
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-2)
    for step in range(300):
        torch.manual_seed(step)
        hidden = torch.randn(3, 7, WIDTH)
        loss = (made(hidden, hidden, a_pass()) - hidden - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert choice_of(made).selection().spec == specs[right]


@pytest.mark.parametrize("modality", ["vis", "text", "vis+text"])
def test_a_fresh_layer_changes_no_bit_and_every_parameter_gets_a_gradient_without_images_too(modality: str) -> None:
    shape = DecoderShape(WIDTH, (LayerShape("layers.0", {}),))
    (made,) = MoReS(tokens=TOKENS, modality=modality, dropout=0.5).build(shape).values()
    hidden = torch.randn(3, 7, WIDTH, requires_grad=True)
    assert torch.equal(made(hidden, hidden, a_pass()), hidden)
    away_from_identity(made)
    text_only = a_pass(torch.zeros_like(VISUAL))
    output = made(hidden, hidden, text_only)
    assert torch.equal(output, hidden)
    output.square().sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_modalities_choose_apart() -> None:
    made = layer(modality="vis+text").eval()
    with torch.no_grad():
        choice_of(made, "text").steer_scores[3] = 1.0
    assert made.selection("vis").spec == "f1" and made.selection("text").spec == "all"
    hidden = torch.randn(3, 7, WIDTH)
    with torch.no_grad():
        changed = (made(hidden, hidden, a_pass()) != hidden).any(-1)
    assert changed[:2].tolist() == [[True, True, False, False, False, False, True], [True, False, False] + [True] * 4]
    assert not changed[2].any(), "text of a sample without an image is not steered"


def test_of_equal_scores_the_first_is_chosen() -> None:
    assert [int(best(torch.tensor(scores))) for scores in ([0.0] * 4, [1.0, 2, 2, 0], [-3.0, -3])] == [0, 1, 0]
    assert layer().eval().selection("vis").spec == "f1"


def test_what_is_kept_in_evaluation_follows_every_change_of_the_scores() -> None:
    made = layer().eval()
    assert made.selection("vis").spec == "f1"
    with torch.no_grad():
        choice_of(made).steer_scores.copy_(torch.tensor([0.0, 1, 0, 0]))
    assert made.selection("vis").spec == "l2"
    with torch.inference_mode():
        assert made.selection("vis").spec == "l2"
    choice_of(made).steer_scores = torch.nn.Parameter(torch.tensor([0.0, 0, 0, 1]))
    assert made.selection("vis").spec == "all"
    made.train()
    choice_of(made).steer_scores.data = torch.tensor([0.0, 0, 1, 0])
    assert made.eval().selection("vis").spec == "uniform3"


def test_in_evaluation_gradients_of_the_scores_are_there_for_who_asks() -> None:
    made, hidden = layer().eval(), torch.randn(3, 7, WIDTH)
    made(hidden, hidden, a_pass()).square().sum().backward()
    assert choice_of(made).steer_scores.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_scores_a_gradient_in_float32(dtype: torch.dtype) -> None:
    made, hidden = layer(), torch.randn(3, 7, WIDTH).to(dtype)
    output = made(hidden, hidden, a_pass())
    assert output.dtype == dtype
    output.square().sum().backward()
    assert choice_of(made).steer_scores.grad.dtype == torch.float32 and choice_of(made).steer_scores.grad.any()


def test_second_derivatives_are_those_of_the_chosen_tokens() -> None:
    """A backward pass that is itself differentiated, as for a gradient penalty."""
    hidden = torch.randn(3, 7, WIDTH)
    found = []
    for made in (layer(), layer("f1")):
        shift = made.get_parameter("vis.steer_shift")
        (first,) = torch.autograd.grad(made(hidden, hidden, a_pass()).pow(3).sum(), shift, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), shift)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_the_log_counts_the_layers_at_each_selection() -> None:
    shape = DecoderShape(WIDTH, tuple(LayerShape(f"layers.{number}", {}) for number in range(3)))
    mode = MoReS(tokens="1%,all")
    modules, hidden = mode.build(shape), torch.randn(3, 7, WIDTH)
    assert mode.report(modules) == {}, "before any pass there is nothing to tell"
    last = modules["layers.2"]
    assert isinstance(last, SteeredLayer)
    choose(last, 1)
    for made in modules.values():
        made(hidden, hidden, a_pass())
    assert mode.report(modules) == {"mores_vis_layers_at_1%": 2.0, "mores_vis_layers_at_all": 1.0}
    assert MoReS().report(MoReS().build(shape)) == {}
    named = {f"{path}.{name}": value for path, made in modules.items() for name, value in made.named_parameters()}
    assert mode.learned(named) == {"chosen tokens, vis": "1%: layers.0, layers.1; all: layers.2"}


# Settings


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("1%,,all", ["nothing stands before or behind one of the commas"]),
        (",", ["nothing stands before or behind one of the commas"]),
        ("1%,5%,1%", ["'1%' and '1%' are the same selection"]),
        ("100%,5%, all", ["'all' and '100%' are the same selection"]),
        ("f4+l5,1%,l5+f4", ["'l5+f4' and 'f4+l5' are the same selection"]),
        ("0%,101%,1%", ["'0%' selects nothing", "'101%' selects nothing or more than everything"]),
        ("0.01,0.2", ["'0.01' is none of all", "in percent: 1%", "in percent: 20%"]),
        (",".join(f"f{number + 1}" for number in range(MANY + 1)), [f"{MANY + 1} selections are more than the {MANY}"]),
    ],
)
def test_all_that_is_wrong_with_a_list_comes_in_one_message(tokens: str, expected: list[str]) -> None:
    (problem,) = MoReS(tokens=tokens).problems()
    assert problem.startswith("mores_tokens: ")
    assert not [text for text in expected if text not in problem], problem


def test_blanks_around_commas_are_no_mistake_and_one_selection_is_no_choice() -> None:
    assert [each.spec for each in parse_choices("1%, f4+l5 ,all")] == ["1%", "f4+l5", "all"]
    assert layer("1%").choice("vis") is None
    assert [name for name, _ in layer("1%").named_parameters()] == [
        f"vis.steer_{part}" for part in ("basis", "shift", "offset")
    ]


def test_selections_that_are_the_same_tokens_of_an_image_are_remarked_on() -> None:
    (remark,) = MoReS(tokens="1%,2%,25%,all").remarks(64)
    assert remark.startswith("1% and 2% of --mores_tokens are the same 1 of the 64 tokens of an image")
    assert MoReS(tokens="1%,2%,25%,all").remarks(576) == []
    assert MoReS(tokens="1%,2%", modality="text").remarks(64) == []
