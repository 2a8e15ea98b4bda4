"""What people's scripts rely on: options, sub-commands and JSON keys. (serve, chat, eval, worker: tests/serving.)

A changed name here breaks a script somewhere: add to these lists, and take nothing out of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.checkout.doctor import examine
from llava_steering_plugin.cli import app
from llava_steering_plugin.harness.arguments import NAMES
from llava_steering_plugin.harness.manifest import MODEL
from llava_steering_plugin.launch import command_parser
from llava_steering_plugin.planning.from_flags import Wanted
from llava_steering_plugin.planning.plan import plan
from llava_steering_plugin.training.settings.flags import extended

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "patch",
    "unpatch",
    "doctor",
    "plan",
    "components",
    "convert",
    "export",
    "eval",
    "serve",
    "chat",
    "diagnose",
    "check-data",
    "score",
    "prepare",
    "report",
    "compare",
}
OPTIONS = {
    "patch": {"--llava"},
    "unpatch": {"--llava"},
    "doctor": {"--llava", "--json"},
    "plan": {"--json", "--gpu", "--gpus", "--sequence"},
    "components": {
        *("tower", "--json", "--mm-vision-select-layer", "--mm_vision_select_layer"),
        *("--mm-vision-select-feature", "--mm_vision_select_feature"),
    },
    "check-data": {
        *("file", "--image-folder", "--image_folder", "--model_name_or_path", "--model-name-or-path", "--version"),
        *("--model_max_length", "--model-max-length", "--vision_tower", "--vision-tower", "--json", "--processes"),
        *("--language_model", "--language-model"),
        *("--image_aspect_ratio", "--image-aspect-ratio", "--mm_projector_type", "--mm-projector-type"),
        *("--several-images", "--video_folder", "--video-folder", "--image_grid_pinpoints", "--image-grid-pinpoints"),
        *("--mm_patch_merge_type", "--mm-patch-merge-type", "--mm_spatial_pool_mode", "--mm-spatial-pool-mode"),
        *("--mm_newline_position", "--mm-newline-position", "--frames_upbound", "--frames-upbound"),
        *("--force_sample", "--force-sample"),
    },
    "compare": {"file", "--dry-run", "--processes"},
    "report": {"results", "--output", "-o", "--title"},
    "prepare": {"task", "--source", "--output", "--split", "--samples", "--seed"},
    "score": {
        *("task", "answers", "--annotations", "--output", "--submission", "--split", "--questions", "--allow-missing"),
        "--per-question",
    },
    "convert": {"source", "target", "--base", "--conversation", "--projector", "--no-projector", "--force"},
    "export": {"base", "target", "--conversation", "--image", "--logits", "--no-logits"},
}
TRAINING = {
    "tuning_mode",
    "adapter_path",
    "eval_data_path",
    "language_model",
    "skip_bad_samples",
    *("steering_diagnostics_steps", "steering_diagnostics_samples"),
    *("mores_rank", "mores_tokens", "mores_modality", "mores_layers", "mores_dropout"),
    *("mixlora_factors", "mixlora_rank", "mixlora_alpha", "mixlora_dropout", "mixlora_start_layer"),
    *("mixlora_routing", "mixlora_conditional", "mixlora_router_grad", "mixlora_balance", "mixlora_targets"),
    *("mixlora_variant", "mixlora_noise", "mixlora_ifs_weight"),
    *("peft_method", "peft_config"),
}
SCRIPTS = {
    *("demo", "finetune_common", "finetune_mixlora", "finetune_mores", "finetune_mores_4bit", "finetune_task_mores"),
    *("eval_papers", "gpu_check", "multitask", "ratios", "setup", "test"),
}
SMALL = {
    "model_type": "llava_llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 500,
}


@pytest.fixture
def group() -> Any:
    return get_command(app)


def test_the_sub_commands_are_these(group: Any) -> None:
    assert set(group.commands) == COMMANDS
    assert {word for option in group.params for word in option.opts} >= {"--debug"}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_options_of_a_sub_command_are_these(group: Any, name: str) -> None:
    parameters = group.commands[name].params
    assert {word for each in parameters for word in (*each.opts, *each.secondary_opts)} == OPTIONS[name]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_names_every_option(group: Any, name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for parameter in group.commands[name].params:
        names = parameter.opts if parameter.param_type_name == "option" else [str(parameter.metavar or "")]
        assert all(word in shown.output for word in names), names


def test_the_options_of_a_diagnosis_are_these(group: Any) -> None:
    measures = group.commands["diagnose"].commands
    words = {
        name: {word for each in measure.params for word in (*each.opts, *each.secondary_opts)}
        for name, measure in measures.items()
    }
    shared = {"models", "--image-folder", "--output", "--samples", "--seed", "--model-base"}
    shared |= {"--device", "--load-4bit", "--load-8bit"}
    assert words == {
        "modality": shared
        | {"--question-file", "--answers-file", "--batch-size", "--conv-mode", "--max-new-tokens", "--per-head"},
        "interference": shared | {"--data", "--version"},
        "routing": shared | {"--data", "--version", "--repeats"},
        "image": (shared - {"models", "--image-folder", "--samples", "--seed"})
        | {"model", "--image", "--question", "--answer", "--effect", "--occlusion-window"}
        | {"--conv-mode", "--max-new-tokens"},
        "steering": shared | {"--question-file", "--answers-file", "--data", "--conv-mode", "--max-new-tokens"},
    }


def test_the_options_of_launch_are_these() -> None:
    words = {word for action in command_parser()._actions for word in action.option_strings}
    assert words == {"--cpu", "--seed", "--same-order", "--measure", "-h", "--help", "--local_rank", "--local-rank"}
    text = command_parser().format_help()
    assert text.startswith(
        "usage: python -m llava_steering_plugin.launch [--cpu] [--seed N] [--same-order] [--measure FILE] MODULE "
    )


def test_what_lmms_eval_is_told_is_this() -> None:
    assert MODEL == "llava_steering"
    assert set(NAMES) == {
        *("adapter", "base", "conversation", "device", "load_4bit", "load_8bit", "seed", "too_long"),
    }
    assert {file.stem for file in (ROOT / "llava_steering_plugin" / "harness" / "tasks").glob("*.yaml")} >= {
        *("iconqa_text", "iconqa_blank", "vsr", "snli_ve", "cifar10", "cifar100", "mnist", "vision_flan"),
    }


def test_the_flags_of_a_training_are_these() -> None:
    @dataclasses.dataclass
    class Original:
        learning_rate: float = 1.0

    flags = {field.name: field.default for field in dataclasses.fields(extended(Original))}
    assert flags.pop("learning_rate") == 1.0
    assert set(flags) == TRAINING
    assert flags.pop("tuning_mode") == "none"
    assert flags.pop("skip_bad_samples") is False
    assert flags.pop("steering_diagnostics_steps") == 0
    assert set(flags.values()) == {None}


def test_doctor_as_json_has_these_keys(llava_copies: Any) -> None:
    report = json.loads(json.dumps(examine(llava_copies.pristine).as_dict()))
    assert report.keys() == {
        *("python", "executable", "llava", "entry_point", "seams", "packages", "devices", "problems", "next_steps"),
        "stopped",
    }
    assert report["llava"].keys() == {"path", "found_by", "distribution", "version", "commit", "state", "others"}
    assert all(seam.keys() == {"name", "purpose", "found", "stops"} for seam in report["seams"])
    assert report["packages"].keys() >= {"torch", "transformers", "peft", "bitsandbytes", "deepspeed", "gradio"}


def test_a_plan_as_json_has_these_keys(tmp_path: Path, llava_copies: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    words = ["--model_name_or_path", str(tmp_path), "--tuning_mode", "mores"]
    report = json.loads(json.dumps(plan(words, Wanted(gpu="T4")).as_json()))
    assert report.keys() == {"mode", "settings", "parameters", "memory", "notes", "problems"}
    assert report["parameters"].keys() == {
        *("mode", "parts", "projector", "trainable", "model", "percent", "lora_r8", "lora_r128"),
    }
    assert report["parameters"]["parts"] == {"mores": report["parameters"]["mode"]}
    memory = report["memory"]
    assert memory.keys() == {"assumed", "gpu", "chosen", "per_gpu"}
    assert memory["gpu"].keys() == {"name", "bytes"}
    assert memory["assumed"].keys() == {
        *("batch", "sequence", "of it visual", "bits", "computed in", "gradient checkpointing", "optimizer", "GPUs"),
    }
    assert memory["per_gpu"].keys() == {"no ZeRO", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"}
    assert memory["chosen"] == "no ZeRO"
    for each in memory["per_gpu"].values():
        assert each.keys() == {
            *("weights", "gradients", "optimizer", "buffers", "activations", "host", "total", "fits"),
        }


def test_the_config_of_an_adapter_has_these_keys() -> None:
    config = AdapterConfig("mores", {"rank": 1}, BaseModel("/models/base", "llava_llama", 64, 4, 700))
    written = json.loads(config.to_json())
    assert written.keys() >= {
        *("base_model_name_or_path", "format_version", "plugin_version", "mode", "settings", "base", "conversation"),
        *("added_tokens", "trained_on"),
    }
    assert written["base"].keys() == {"model_type", "hidden_size", "num_layers", "vocab_size"}
    assert written["format_version"] == 1


def test_the_page_has_one_option_beside_those_of_llava() -> None:
    from llava_steering_plugin.serving import page

    assert page.LOG_REQUESTS == "--log-requests"


@pytest.mark.parametrize("module", ["launch", "serving.worker", "serving.page", "__main__"])
def test_a_module_that_people_start_with_python_m_is_there(module: str) -> None:
    assert (ROOT / "llava_steering_plugin" / f"{module.replace('.', '/')}.py").is_file()


def test_the_shell_scripts_have_these_names() -> None:
    assert {file.stem for file in (ROOT / "scripts").glob("*.sh")} >= SCRIPTS


def test_the_block_of_the_patch_has_the_same_bytes_and_its_entry_point_can_be_called() -> None:
    from llava_steering_plugin.checkout.patch import BLOCK, ENTRY_POINT

    module, _, function = ENTRY_POINT.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
    assert module in sys.modules
    # A block of other bytes would be taken for one that was edited by hand, in every LLaVA that is patched already.
    assert hashlib.sha256(BLOCK.encode()).hexdigest() == (
        "3ee052ca05b3caac2bfa7d5d9248a9270041a6fc0aaedca8bb5e3d45de34bf52"
    )
