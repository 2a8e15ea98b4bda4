"""The names that adapters get, held against the rules that upstream's programs have written in."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llava_steering_plugin.adapters.stored.config import AdapterConfig, BaseModel
from llava_steering_plugin.adapters.stored.writing import write_folder
from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.upstream.names import CHAT_PREFIXES, display_name

# Which of upstream's templates speaks like the one that an adapter was trained with.
SPOKEN = {
    "v1": "llava_v1",
    "vicuna_v1": "llava_v1",
    "llava_v1": "llava_v1",
    "llama_2": "llava_llama_2",
    "llava_llama_2": "llava_llama_2",
    "mistral_instruct": "mistral_instruct",
    "chatml_direct": "chatml_direct",
    "mpt": "mpt",
    "v0": "llava_v0",
    "llava_v0": "llava_v0",
    None: "llava_v0",
}
MISLEADING = "LLaVA-lora-llama-2-Mixtral-mistral-hermes-v1.6-34b-mpt-mmtag-plain"


def adapter(folder: Path, conversation: str | None) -> Path:
    base = BaseModel("/models/base", "llava_llama", 64, 4, 700)
    write_folder(folder, AdapterConfig("mores", {"rank": 1}, base, conversation), {}, "{}", "")
    return folder


def rule(module: str, variable: str) -> tuple[str, ast.If]:
    """Upstream's own chain of `if`s that decides by `model_name` what `variable` is, as its source has it."""
    found = find_spec(module)
    assert found is not None and found.origin is not None
    for node in ast.walk(ast.parse(Path(found.origin).read_text())):
        if isinstance(node, ast.If) and "model_name" in ast.unparse(node.test):
            assigned = {
                target.id for part in ast.walk(node) for target in getattr(part, "targets", ()) if hasattr(target, "id")
            }
            if assigned == {variable}:
                return found.origin, node
    raise AssertionError(f"{module} decides otherwise by now")


@pytest.mark.parametrize("folder", ["pets", MISLEADING])
@pytest.mark.parametrize(
    ("module", "variable"),
    [
        ("llava.serve.cli", "conv_mode"),
        ("llava.eval.run_llava", "conv_mode"),
        ("llava.serve.gradio_web_server", "template_name"),
    ],
)
def test_upstreams_programs_pick_the_template_that_the_adapter_was_trained_with(
    patched_llava: Path, tmp_path: Path, module: str, variable: str, folder: str
) -> None:
    origin, chain = rule(module, variable)
    program = compile(ast.Module([chain], type_ignores=[]), origin, "exec")
    picked = {}
    for conversation in SPOKEN:
        space = {"model_name": display_name(adapter(tmp_path / str(conversation) / folder, conversation))}
        exec(program, space)
        picked[conversation] = space[variable]
    assert picked == SPOKEN


def test_every_template_that_has_a_name_is_checked_and_is_one_of_upstreams(patched_llava: Path) -> None:
    from llava.conversation import conv_templates

    assert CHAT_PREFIXES.keys() == SPOKEN.keys() - {None}
    assert CHAT_PREFIXES.keys() <= conv_templates.keys()


def test_a_checkpoint_is_called_by_its_runs_name_too(tmp_path: Path) -> None:
    checkpoint = adapter(tmp_path / "pets" / "checkpoint-20", "v1")
    assert display_name(checkpoint) == display_name(f"{checkpoint}/") == "llava-v1-pets_checkpoint-20"


def test_a_template_that_no_name_leads_to_is_refused_with_the_flag_that_does(
    patched_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(adapter(tmp_path / "pets", "v1_mmtag"))
    monkeypatch.setattr(sys, "argv", ["cli.py", "--model-path", folder])
    with pytest.raises(UpstreamError, match=r"'v1_mmtag'.* --conv-mode v1_mmtag; .* --model-name"):
        display_name(folder)
    from llava.mm_utils import get_model_name_from_path

    assert get_model_name_from_path(folder) == "llava-pets"  # programs that load it need a name all the same
    assert "--conv-mode v1_mmtag" in caplog.text
    for given in (["--conv-mode", "v1_mmtag"], ["--conv-mode=v1_mmtag"]):
        monkeypatch.setattr(sys, "argv", ["cli.py", "--model-path", folder, *given])
        assert display_name(folder) == "llava-pets"


def test_what_is_no_adapter_of_ours_has_no_name_from_us(tmp_path: Path) -> None:
    assert display_name(tmp_path) is None
    assert display_name("nobody/has-this") is None
