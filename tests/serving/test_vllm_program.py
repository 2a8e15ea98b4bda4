"""`serve --engine vllm` says what cannot work before anything starts, and else how vLLM's server is started.

The running server: tests/vllm/test_server.py. Covers `serving/vllm_prompts.py` and `serving/vllm_adapters.py` too.
"""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import change_tensors, set_header
from base_folders import base_folder
from safetensors.torch import save_file
from steered import base_of

from llava_steering_plugin import attach, remove_adapter, save_adapter
from llava_steering_plugin.adapters.stored.folder import EXTRA, HEADER, AdapterFolder
from llava_steering_plugin.errors import SteeringError
from llava_steering_plugin.modes.base import Mode
from llava_steering_plugin.modes.mixlora import MixLoRA
from llava_steering_plugin.modes.mores import MoReS
from llava_steering_plugin.serving import vllm_program
from llava_steering_plugin.serving.options import KEY_VARIABLE, TOKEN_VARIABLE, Engine, ServeOptions
from llava_steering_plugin.serving.vllm_program import Launch, planned
from llava_steering_plugin.vllm.plugin import ANYWAY, TRIED
from llava_steering_plugin.vllm.refusals import PROJECTORS

TEMPLATE = "{% for message in messages %}USER: {{ message['content'] }}{% endfor %}"
SECRET = "0123456789abcdef"


def adapter(
    folder: Path, mode: Mode, conversation: str | None = None, template: str | None = None, **sizes: int
) -> Path:
    model = base_of(**sizes)
    attach(model, mode)
    save_adapter(model, folder)
    remove_adapter(model)
    config = replace(AdapterFolder(folder).config, conversation=conversation, chat_template=template)
    set_header(folder, **{HEADER: config.to_json()})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What `llava-steering export` makes of a LLaVA, as far as it is looked at."""
    folder = tmp_path / "my-base-hf"
    folder.mkdir()
    sizes = {name: getattr(base_of().config, name) for name in ("num_hidden_layers", "hidden_size")}
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": sizes}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "llava_export.json").write_text(json.dumps({"conversation": {"name": "vicuna_v1"}}))
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM were there: LLaVA's environment, in which this runs, cannot have it."""
    monkeypatch.setattr(vllm_program, "find_spec", lambda name: object())


def launch(base: Path, **options: Any) -> Launch:
    return planned(ServeOptions(base=str(base), engine=Engine.VLLM, **options))


def refusal(base: Path, **options: Any) -> str:
    with pytest.raises(SteeringError) as refused:
        launch(base, **options)
    return str(refused.value)


def after(words: list[str], flag: str) -> list[str]:
    """What follows a flag, up to the next."""
    rest = words[words.index(flag) + 1 :]
    return rest[: next((number for number, word in enumerate(rest) if word.startswith("--")), len(rest))]


@pytest.mark.usefixtures("installed")
def test_names_adapters_and_limits_become_vllms_flags(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "a,b=c", MoReS(rank=1))
    two = adapter(tmp_path / "two", MoReS(rank=9))
    made = launch(
        base,
        adapters=[f"one={one}", str(two)],
        api_key=SECRET,
        admin_token=SECRET[::-1],
        admin_any_path=True,
        allowed_host=["gpu-3.example"],
        vllm_flags="--tensor-parallel-size 2 --limit-mm-per-prompt '{\"image\": 2}'",
        model_name="base",
    )
    words = made.words
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"] and made.models == ["base", "one", "two"]
    assert after(words, "--model") == [str(base)] and after(words, "--served-model-name") == ["base"]
    modules = [json.loads(each) for each in after(words, "--lora-modules")]
    assert modules == [{"name": "one", "path": str(one)}, {"name": "two", "path": str(two)}]
    assert after(words, "--lora-target-modules") == ["steering", "steering_tokens"]
    assert after(words, "--max-lora-rank") == ["16"] and after(words, "--max-loras") == ["8"]
    assert (
        after(words, "--host") == ["127.0.0.1"] and made.address == f"http://127.0.0.1:{after(words, '--port')[0]}/v1"
    )
    assert words[-4:] == ["--tensor-parallel-size", "2", "--limit-mm-per-prompt", '{"image": 2}']
    # vLLM takes no list of hosts for all hosts.
    assert after(words, "--allowed-media-domains") == ["no-host.invalid"]
    assert made.environment[KEY_VARIABLE] == SECRET and made.environment[TOKEN_VARIABLE] == SECRET[::-1]
    assert made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1" and SECRET not in " ".join(words)


@pytest.mark.usefixtures("installed")
def test_a_folder_of_adapters_is_served_beside_those_that_are_named(base: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "notes").mkdir()
    pets, cars = adapter(shelf / "pets", MoReS()), adapter(tmp_path / "cars", MoReS())
    made = launch(base, adapters=[str(cars)], adapter_dir=shelf, max_resident=3)
    assert made.models == ["my-base-hf", "cars", "pets"] and str(pets) in " ".join(made.words)
    assert after(made.words, "--max-loras") == after(made.words, "--max-cpu-loras") == ["3"]
    assert made.environment[TOKEN_VARIABLE] == "" and made.environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"


@pytest.mark.usefixtures("installed")
def test_projectors_of_adapters_own_turn_on_their_flag(base: Path, tmp_path: Path) -> None:
    parts = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
    linear = {f"{EXTRA}model.mm_projector.2.{leaf}": value for leaf, value in parts.items()}
    own, plain, half = (adapter(tmp_path / name, MoReS()) for name in ("own", "plain", "half"))
    change_tensors(own, lambda tensors: tensors.update(linear))
    change_tensors(half, lambda tensors: tensors.update({f"{EXTRA}model.mm_projector.0.bias": parts["bias"]}))
    assert PROJECTORS in launch(base, adapters=[str(plain), str(own)]).words
    assert PROJECTORS not in launch(base, adapters=[str(plain)]).words
    assert "brings parts of the model (model.mm_projector.0.bias)" in refusal(base, adapters=[str(half)])


@pytest.mark.usefixtures("installed")
def test_all_mistakes_are_said_at_once(base: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = refusal(
            base,
            adapters=[
                f"mix={adapter(tmp_path / 'mix', MixLoRA(factors=4, rank=2))}",
                f"words={adapter(tmp_path / 'words', MoReS(modality='vis+text'))}",
                f"large={adapter(tmp_path / 'large', MoReS(), num_hidden_layers=3)}",
            ],
            load_4bit=True,
            controller_port=9,
            vllm_flags="--port 3",
            api_host="127.0.0.1",
            worker_port=taken.getsockname()[1],
            admin_token=SECRET,
            allowed_media_domains=["http://x/"],
        )
    for said in (
        "--load-4bit, --controller-port: vLLM's server has no such option",
        "--vllm-flags has --port",
        "'mix'",
        "MixLoRA, which chooses its factors by the mean",
        "llava-steering serve",
        "steers vis+text",
        "trained on 3 layers",
        "say --admin-any-path",
        "Address already in use",
        "--allowed-media-domains http://x/",
    ):
        assert said in text, said


@pytest.mark.usefixtures("installed")
def test_what_cannot_be_the_base_is_said_with_what_to_do(base: Path, tmp_path: Path) -> None:
    llava = base_folder(tmp_path / "llava")
    assert f"llava-steering export {llava} {llava}-hf" in refusal(llava)
    pets = adapter(tmp_path / "pets", MoReS())
    assert "is an adapter, no base" in refusal(pets)
    (base / "config.json").write_text('{"model_type": "llava_next", "text_config": {}}')
    assert "a model of type 'llava_next'" in refusal(base)
    assert "needs a key" not in refusal(base, api_host="0.0.0.0", no_api_key=True)
    assert "Give a key for it" in refusal(base, api_host="0.0.0.0")


def test_without_vllm_it_is_said_what_to_install(base: Path) -> None:
    pytest.importorskip("llava")  # beside it there is no vLLM
    assert "llava-steering-plugin[vllm]" in refusal(base)


@pytest.mark.usefixtures("installed")
def test_a_version_that_was_not_tried_needs_to_be_asked_for(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_program.metadata, "version", lambda package: "9.8.7+cpu")
    monkeypatch.delenv(ANYWAY, raising=False)
    assert f"this is vLLM 9.8.7, and llava-steering-plugin was tried with {', '.join(TRIED)}" in refusal(base)
    monkeypatch.setenv(ANYWAY, "1")
    assert launch(base).models == ["my-base-hf"]


@pytest.mark.usefixtures("installed")
def test_prompts_have_the_template_that_the_adapters_were_trained_with(base: Path, tmp_path: Path) -> None:
    def template(*adapters: Path) -> list[str]:
        return after(launch(base, adapters=[str(each) for each in adapters]).words, "--chat-template")

    own = ["{{ bos_token }}" + TEMPLATE]
    assert template() == own
    unknown = adapter(tmp_path / "unknown", MoReS())
    same = adapter(tmp_path / "same", MoReS(), "v1", TEMPLATE)
    older = adapter(tmp_path / "older", MoReS(), "v1")
    assert template(unknown, same, older) == own
    other = adapter(tmp_path / "other", MoReS(), "mpt", "{{ messages }}")
    assert template(other) == ["{{ bos_token }}{{ messages }}"]
    assert "different conversation templates" in refusal(base, adapters=[str(same), str(other)])
    strange = adapter(tmp_path / "strange", MoReS(), "llava_llama_2")
    assert "strange: llava_llama_2" in refusal(base, adapters=[str(strange)])


def test_a_template_that_cannot_be_read_is_named(base: Path, installed: None) -> None:
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert f"{base / 'chat_template.jinja'} cannot be read: " in refusal(base)


@pytest.mark.usefixtures("installed")
def test_an_adapter_of_other_weights_is_named_before_anything_starts(base: Path, tmp_path: Path) -> None:
    good, other = adapter(tmp_path / "good", MoReS(rank=1)), adapter(tmp_path / "other", MoReS(rank=1))
    change_tensors(other, lambda tensors: tensors["fingerprint.rows"].mul_(1.5))
    rows = base_of().get_input_embeddings().weight.detach().clone()
    save_file({"language_model.model.embed_tokens.weight": rows}, base / "model.safetensors")
    assert launch(base, adapters=[str(good)]).models[1:] == ["good"]
    said = refusal(base, adapters=[str(good), str(other)])
    assert "'other'" in said and "same shape, other weights" in said and "'good'" not in said
