"""vLLM's own server over HTTP, as `serve --engine vllm` starts it, with two ranks of tensor parallel.

Covers `serving/vllm_program.py`, `serving/http/vllm_gate.py`; the plugin is loaded in four processes.
"""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from adapter_files import change_tensors
from vllm_bases import llavas_tokens
from vllm_fixtures import Prompt, Shared, differing
from vllm_projectors import save_with_projector
from vllm_server import EXACT, KEY, TOKEN, message, served

pytest.importorskip("vllm", reason="needs vLLM: scripts/setup.sh --vllm makes .venv-vllm")
QUESTIONS = ("What is it?", "What color is it?", "Is it red?")


@pytest.fixture(scope="module")
def client(shared: Shared) -> Iterator[Any]:
    from openai import OpenAI

    with served(shared, "--tensor-parallel-size", "2", "--enable-tower-connector-lora") as address:
        yield OpenAI(base_url=address, api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def own_projector(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a projector of its own, that the server does not begin with."""
    return save_with_projector(shared.reference, 1, tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def expected(shared: Shared, own_projector: Path) -> dict[str, list[list[int]]]:
    """Transformers' answers to QUESTIONS about pictures, in prompts that the chat template writes."""
    prompts = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = shared.reference.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        prompts.append(Prompt(text, shared.prompts[number].images))
    adapters = {**shared.adapters, "own projector": own_projector}
    found = {name: shared.reference.answers(prompts, folder) for name, folder in adapters.items()}
    return {"base": shared.reference.answers(prompts)} | found


def answer(client: Any, shared: Shared, name: str, number: int) -> list[int]:
    done = client.chat.completions.create(
        model=name, messages=[message(QUESTIONS[number], *shared.prompts[number].images)], **EXACT
    )
    found: list[int] = done.choices[0].token_ids
    return found


def told(client: Any, route: str, **body: Any) -> Any:
    return client.with_options(api_key=TOKEN).post(route, body=body, cast_to=str)


def test_adapters_are_models_beside_the_base(client: Any, shared: Shared) -> None:
    models = {model.id: model for model in client.models.list()}
    assert models.keys() == {"base", *shared.adapters}
    assert all(models[name].parent == "base" for name in shared.adapters)


def test_concurrent_clients_get_the_answers_of_transformers(
    client: Any, shared: Shared, expected: dict[str, list[list[int]]], own_projector: Path
) -> None:
    assert all(
        2 * differing(found, expected["base"]) >= len(found) for name, found in expected.items() if name != "base"
    )
    told(client, "/load_lora_adapter", lora_name="own projector", lora_path=str(own_projector))
    asked = [(name, number) for number in range(len(QUESTIONS)) for name in expected]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda pair: answer(client, shared, *pair), asked))
    assert found == [expected[name][number] for name, number in asked]


def test_prompts_have_the_tokens_of_llavas_own_template(client: Any, shared: Shared) -> None:
    asked = [("What is it?", 1, None), ("What is red?", 0, None), ("Which?", 2, None), ("Is it?", 1, "Say one word.")]
    config = shared.reference.model.config
    image = [config.image_token_index] * config.image_seq_length
    for (question, count, system), tokens in zip(asked, llavas_tokens(shared.llava, asked), strict=True):
        said = message(question, *shared.prompts[4].images[:count])
        said["content"].reverse()  # LLaVA has images first, wherever they are among the parts
        spoken = [{"role": "system", "content": system}] * (system is not None) + [said]
        done = client.chat.completions.create(model="all-1", messages=spoken, **EXACT)
        expected = [each for token in tokens for each in ([token] if token >= 0 else image)]
        assert done.prompt_token_ids == expected, question


def test_a_stream_is_the_answer_in_pieces(client: Any, shared: Shared, expected: dict[str, list[list[int]]]) -> None:
    stream = client.chat.completions.create(
        model="all-4", messages=[message(QUESTIONS[0], *shared.prompts[0].images)], stream=True, **EXACT
    )
    text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    # Behind a prompt, the first word begins with a space.
    assert text.strip() == shared.reference.processor.tokenizer.decode(expected["all-4"][0])


def test_what_is_wrong_is_said_and_others_are_answered(
    client: Any, shared: Shared, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    from openai import APIStatusError, BadRequestError, NotFoundError

    other = Path(shutil.copytree(shared.adapters["all-1"], tmp_path / "other"))
    change_tensors(other, lambda tensors: tensors["fingerprint.rows"].mul_(1.5))
    with pytest.raises(NotFoundError, match="nobody"):
        answer(client, shared, "nobody", 0)
    with pytest.raises(APIStatusError, match="embedding rows that identify the base differ"):
        told(client, "/load_lora_adapter", lora_name="other", lora_path=str(other))
    with pytest.raises(NotFoundError):
        answer(client, shared, "other", 0)
    with pytest.raises(BadRequestError, match="image"):
        pictures = [picture for prompt in shared.prompts[:3] for picture in prompt.images]
        client.chat.completions.create(model="all-1", messages=[message("Which?", *pictures)], **EXACT)
    for name in ("base", "all-1", "f4l5-2"):
        assert answer(client, shared, name, 1) == expected[name][1]


def test_keys_are_asked_for_and_other_sites_kept_out(client: Any, shared: Shared, tmp_path: Path) -> None:
    from openai import AuthenticationError, NotFoundError, PermissionDeniedError

    stranger = client.with_options(api_key="another-key-than-it-should-be")
    with pytest.raises(AuthenticationError, match="key of the API"):
        stranger.models.list()
    folder = str(shared.adapters["all-1"])
    with pytest.raises(AuthenticationError, match="admin token"):
        client.post("/load_lora_adapter", body={"lora_name": "pets", "lora_path": folder}, cast_to=str)
    with pytest.raises(PermissionDeniedError, match="another site"):
        client.with_options(default_headers={"Origin": "https://evil.example"}).models.list()
    with pytest.raises(NotFoundError):
        answer(client, shared, "pets", 0)
    address = str(client.base_url).removesuffix("/v1/")
    with urllib.request.urlopen(f"{address}/health") as response:
        assert response.status == 200


def test_a_retrained_adapter_is_loaded_by_the_same_name(
    client: Any, shared: Shared, expected: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    folder = tmp_path / "pets"

    def train(name: str) -> None:
        shutil.copytree(shared.adapters[name], folder, dirs_exist_ok=True)

    def answers() -> list[list[int]]:
        return [answer(client, shared, "pets", number) for number in range(len(QUESTIONS))]

    train("all-1")
    told(client, "/load_lora_adapter", lora_name="pets", lora_path=str(folder))
    assert answers() == expected["all-1"]
    train("all-4")
    told(client, "/load_lora_adapter", lora_name="pets", lora_path=str(folder), load_inplace=True)
    assert answers() == expected["all-4"]
    train("uniform9-3")
    told(client, "/unload_lora_adapter", lora_name="pets")
    told(client, "/load_lora_adapter", lora_name="pets", lora_path=str(folder))
    assert answers() == expected["uniform9-3"]
