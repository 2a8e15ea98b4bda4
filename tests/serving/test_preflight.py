"""`serve` says what cannot work before it starts a program, without torch, and advises only flags that it has."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from base_folders import adapter_folder, base_folder
from training_runs import subprocess_environment
from typer.main import get_command

from llava_steering_plugin.cli import app
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.inference.sources import shown_base, shown_name
from llava_steering_plugin.serving.options import ServeOptions
from llava_steering_plugin.serving.preflight import check_server, name_of_base

FLAGS = {
    flag
    for each in get_command(app).commands["serve"].params  # type: ignore[attr-defined]
    for flag in each.opts
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(base_folder(tmp_path / "base"))


def refusal(base: str, **options: object) -> str:
    with pytest.raises(SteeringError) as refused:
        check_server(ServeOptions(base=base, **options))  # type: ignore[arg-type]
    return str(refused.value)


@pytest.mark.usefixtures("patched_llava")
def test_a_command_line_that_can_work_passes(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what --device cpu sets is taken back
    pets = adapter_folder(tmp_path / "pets")
    check_server(ServeOptions(base=base))
    check_server(ServeOptions(base=base, adapters=[str(pets), f"mine={pets}"], adapter_dir=tmp_path, device="cpu"))


@pytest.mark.usefixtures("patched_llava")
def test_each_mistake_is_said_with_flags_that_serve_has(base: str, tmp_path: Path) -> None:
    pets = adapter_folder(tmp_path / "pets")
    large = adapter_folder(tmp_path / "large", hidden_size=4096)
    unknown = adapter_folder(tmp_path / "unknown", conversation="an_own_template")
    mistral = adapter_folder(tmp_path / "mistral", conversation="mistral_instruct")
    plain = base_folder(tmp_path / "plain")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    said = {
        "there is no folder .*nowhere": refusal(str(tmp_path / "nowhere")),
        "pets is an adapter, no base": refusal(str(pets)),
        "plain is no LLaVA": refusal(str(plain)),
        "nowhere is no folder": refusal(base, adapters=["/nowhere"]),
        "base holds no adapter": refusal(base, adapters=[base]),
        "32|4096": refusal(base, adapters=[str(large)]),
        "cannot pick from a model's name": refusal(base, adapters=[str(unknown)]),
        "shown as 'm.pt', the name of the adapter 'm.pt'": refusal(base, adapters=[f"m.pt={pets}", f"mpt={pets}"]),
        "the name of the base": refusal(base, adapters=[f"a={pets}"], model_name="a"),
        "called in the API 'llava-mistral-a', the name of the adapter 'a'": refusal(
            base, adapters=[f"a={mistral}", f"llava-mistral-a={pets}"], model_name="a"
        ),
        "--adapter-dir /nowhere is no folder": refusal(base, adapter_dir=Path("/nowhere")),
        "torch knows no such device": refusal(base, device="gpu"),
        "finds no GPU|torch finds": refusal(base, device="cuda:99"),
        "--allowed-host http://x/": refusal(base, allowed_host=["http://x/"]),
        "needs 16 at least": refusal(base, admin_token="secret"),
        "--watch-every nan": refusal(base, watch_every=float("nan")),
        "--limit-body-mb inf": refusal(base, limit_body_mb=float("inf")),
        "--stall-seconds 1e": refusal(base, stall_seconds=1e9),
        "exclude each other": refusal(base, load_4bit=True, load_8bit=True),
    }
    for expected, text in said.items():
        assert re.search(expected, text), (expected, text)
        assert set(re.findall(r"(?<![\w-])--[\w-]+", text)) <= FLAGS, text


def test_all_adapters_that_cannot_be_served_are_named_at_once(base: str, tmp_path: Path, patched_llava: Path) -> None:
    large = adapter_folder(tmp_path / "large", hidden_size=4096)
    unknown = adapter_folder(tmp_path / "unknown", conversation="an_own_template")
    text = refusal(base, adapters=[str(large), str(unknown)])
    assert "'large'" in text and "'unknown'" in text


def test_the_name_of_a_base_is_the_one_that_llava_gives_it(patched_llava: Path) -> None:
    from llava.mm_utils import get_model_name_from_path

    for path in ("owner/llava-v1.5-7b", "/a/llava-x/", "/a/run/checkpoint-10", "alone"):
        assert name_of_base(path) == get_model_name_from_path(path)


def test_a_base_of_another_language_model_is_shown_with_its_template() -> None:
    """LLaVA's page would prompt a base of any other name as it prompts Vicuna."""
    assert shown_base("pets", {"model_type": "llava_llama"}) == "pets"
    assert shown_base("pets", {"model_type": "llava_qwen2"}) == "qwen2_5:pets"
    assert shown_base("pets", {"model_type": "llava_gemma"}) == "gemma:pets"
    assert shown_base("pets", {"model_type": "llava_mpt"}) == "pets", "no component: LLaVA goes by the name"
    assert shown_name("cats", None, "qwen2_5:pets") == "qwen2_5:pets_cats"


def test_serve_stops_before_it_imports_torch_or_starts_anything(base: str, tmp_path: Path, patched_llava: Path) -> None:
    words = ["llava_steering_plugin", "serve", base, "--adapters", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words],
        cwd=tmp_path,
        env=subprocess_environment(patched_llava),
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 1 and "holds no adapter" in done.stderr
    assert "starting" not in done.stdout
    imported = set(re.findall(r"^import time:[^|]*\|[^|]*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "llava_steering_plugin.serving.preflight" in imported
    assert not imported & {"torch", "transformers", "llava", "gradio"}
