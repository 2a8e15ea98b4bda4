"""Have LLaVA train and load language models that it has no code for, by the components that describe them."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from llava_steering_plugin.components.base import LanguageModel
from llava_steering_plugin.components.model_types import language_models, of_llava_type, of_model_type
from llava_steering_plugin.components.registry import LANGUAGE_MODELS
from llava_steering_plugin.errors import ArgumentsError, UpstreamError, nearest
from llava_steering_plugin.training.settings.flags import LANGUAGE_MODEL as FLAG
from llava_steering_plugin.upstream.model.llava_classes import llava_class
from llava_steering_plugin.upstream.seams import require
from llava_steering_plugin.upstream.text.chat_templates import offer_if_any
from llava_steering_plugin.upstream.text.tokenizers import Tokenizers, WithTokenizers

# LLaVA's modules hold one class and one tokenizer loader for the whole process.
_ONE_AT_A_TIME = threading.RLock()


def types_of_llava() -> set[str]:
    """Return the model types for which the LLaVA that is installed has classes of its own, plain and its own ones."""
    from transformers import CONFIG_MAPPING

    import_module("llava.model")
    own = [each for each in CONFIG_MAPPING._extra_content.values() if each.__module__.startswith("llava.")]
    parents = {parent.model_type for each in own for parent in each.__mro__[1:] if getattr(parent, "model_type", "")}
    # LLaVA's first checkpoints say "llava" and no more.
    return {"llava", *parents, *(each.model_type for each in own)}


def type_in_llava(model_type: str) -> str:
    """Return what the LLaVA that is installed calls a model type for which it has a class under another name.

    LLaVA-NeXT has llava_qwen for what a component calls llava_qwen2. Any other type is returned as it is.
    """
    component = of_llava_type(model_type)
    names = () if component is None else (model_type, *component.llava_types())
    return next((name for name in names if name in types_of_llava()), model_type)


def own_class(model_type: str) -> Any:
    """Return LLaVA's own class for a base of that type, plain or a LLaVA; None if it has none.

    Where it has several for one language model, it is the first.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    import_module("llava.model")
    own = [each for each in CONFIG_MAPPING._extra_content.values() if each.__module__.startswith("llava.")]
    wanted = "llava_llama" if model_type == "llava" else type_in_llava(model_type)
    for parents in (False, True):
        for config in own:
            types = [each.model_type for each in config.__mro__ if getattr(each, "model_type", "")]
            if wanted in (types[1:] if parents else types[:1]) and config in MODEL_FOR_CAUSAL_LM_MAPPING:
                return MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return None


def chosen(described: Mapping[str, Any], base: str, named: str | None = None) -> type[LanguageModel] | None:
    """Return the component that makes a LLaVA of a base; None if LLaVA's own classes do.

    Args:
        described: config.json of the base, a plain language model or a LLaVA.
        base: its name, for errors.
        named: --language_model.

    Raises:
        ArgumentsError: there is no component of that name, or the base is of another type.
        SteeringError: it cannot be loaded.
    """
    model_type = str(described["model_type"])
    if named is not None:
        component = LANGUAGE_MODELS.get(named)
        if model_type not in (component.model_type, *component.llava_types()):
            raise ArgumentsError(
                f"--{FLAG} {named} is for bases of type {component.model_type!r} or {component.llava_type!r}; the "
                f"config.json of {base} says {model_type!r}.{_suggestion(model_type)}"
            )
    elif type_in_llava(model_type) in types_of_llava():
        return None
    else:
        found = of_llava_type(model_type) or of_model_type(model_type)
        if found is None:
            return None
        component = found
    if missing := component.missing():
        raise ArgumentsError(f"{base} is of type {model_type!r}, which needs {missing}.")
    return component


def _suggestion(model_type: str) -> str:
    other = of_llava_type(model_type) or of_model_type(model_type)
    return f" Give --{FLAG} {other.name}." if other else ""


def unknown_type(model_type: str, base: str) -> str | None:
    """Return what to say of a base that neither LLaVA nor a component can make a LLaVA of; None if one can."""
    known = types_of_llava() | {each.model_type for each in language_models()}
    known |= {name for each in language_models() for name in each.llava_types()}
    if model_type in known:
        return None
    return (
        f"{base} is of type {model_type!r}, and neither LLaVA nor a component that is installed here knows it: "
        f"{nearest(model_type, known)}known are {', '.join(sorted(known))}. A package that brings it registers it as "
        f"{LANGUAGE_MODELS.group}"
    )


def loaded_as(model_type: str) -> type[LanguageModel] | None:
    """Return the component of a checkpoint's model type; None if LLaVA loads it itself.

    Raises:
        UpstreamError: neither LLaVA nor a component has a LLaVA's type; or it needs another transformers.
    """
    if type_in_llava(model_type) in types_of_llava() or not model_type.startswith("llava"):
        return None
    component = of_llava_type(model_type)
    if component is None:
        from transformers import CONFIG_MAPPING

        if model_type in CONFIG_MAPPING:  # transformers' own, such as llava_next: LLaVA says what it says
            return None
        raise UpstreamError(f"{unknown_type(model_type, 'the checkpoint')}.")
    if missing := component.missing():
        raise UpstreamError(f"the checkpoint is of type {model_type!r}, which needs {missing}.")
    return component


def register(component: type[LanguageModel], model_type: str | None = None) -> Any:
    """Return the LLaVA class of a component; transformers' AutoConfig and AutoModel know it from then on.

    Args:
        model_type: of the checkpoint; None, or the plain language model's: what the component calls its LLaVAs.
    """
    known = component.llava_types()
    return llava_class(component.causal_class(), model_type if model_type in known else component.llava_type)


@contextmanager
def in_training(module: ModuleType, component: type[LanguageModel] | None) -> Iterator[None]:
    """Have `llava.train.train` build the component's LLaVA, with its tokenizer, for as long as the block runs.

    Args:
        module: `llava.train.train`.
        component: None leaves it as it is.
    """
    if component is None:
        yield
        return
    require(module, "LlavaLlamaForCausalLM")
    transformers = WithTokenizers(require(module, "transformers"), component.name)
    with replaced(module, LlavaLlamaForCausalLM=register(component), transformers=transformers):
        yield


def load_by_type(
    module: ModuleType, original: Callable[..., Any], call: inspect.BoundArguments, model_type: str | None
) -> Any:
    """Return what LLaVA's `load_pretrained_model` does for a checkpoint, with the component of its model type.

    Args:
        module: `llava.model.builder`.
        original: its function, and `call` its arguments; they are changed.
        model_type: of the checkpoint's config.json; None if it is unknown.

    Raises:
        UpstreamError: neither LLaVA nor a component has a LLaVA's type; or it needs another transformers.
    """
    component = None
    if model_type is not None:
        # On a separate base LLaVA only builds Llamas, also where it has a class for checkpoints that are whole.
        separate = call.arguments.get("model_base") is not None
        component = (of_llava_type(model_type) if separate else None) or loaded_as(model_type)
        if component is None and (own := type_in_llava(model_type)) != model_type:
            call.arguments["model_name"] = own.replace("_", "-")
    if component is not None:
        # LLaVA goes by parts of names; this one has none but what the files are.
        lora = os.path.isfile(os.path.join(call.arguments["model_path"], "adapter_config.json"))
        call.arguments["model_name"] = "llava-lora" if lora else "llava"
    with in_loading(module, component, model_type):
        loaded = original(*call.args, **call.kwargs)
    offer_if_any(loaded[0], str(call.arguments["model_path"]))
    return loaded


@contextmanager
def in_loading(
    module: ModuleType, component: type[LanguageModel] | None, model_type: str | None = None
) -> Iterator[None]:
    """Have `llava.model.builder` load the component's LLaVA, with its tokenizer, for as long as the block runs.

    Args:
        module: `llava.model.builder`.
        component: None leaves it as it is.
        model_type: of the checkpoint.
    """
    with _ONE_AT_A_TIME:
        if component is None:
            yield
            return
        require(module, "LlavaLlamaForCausalLM")
        tokenizers = Tokenizers(require(module, "AutoTokenizer"), component.name)
        with replaced(module, LlavaLlamaForCausalLM=register(component, model_type), AutoTokenizer=tokenizers):
            yield


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Put other objects under names of a module, for as long as the block runs."""
    before = {name: module.__dict__[name] for name in names}
    module.__dict__.update(names)
    try:
        yield
    finally:
        module.__dict__.update(before)
