"""List the names of LLaVA and transformers that the plugin relies on, and look them up.

A seam is a name that the plugin replaces, wraps, overrides or calls. `doctor` looks the seams up in the source, without
importing it; import hooks fetch theirs with `require`, so that a missing one is reported by its name. A test compares
`SEAMS` with what the package really uses.

LLaVA main (c121f04), its 1.2.2.post1 wheel and LLaVA-NeXT (df17966) have every name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llava_steering_plugin.errors import UpstreamError
from llava_steering_plugin.upstream.source import defined_names, module_file, package_folder
from llava_steering_plugin.upstream.trainer_seams import OF_TRAINER

# What a missing name stops: training, adapters in LLaVA's own programs, or a sub-command of `llava-steering`.
COMMANDS = ("train", "load", "plan", "chat", "eval", "serve", "diagnose")
TRAIN, LOAD, PLAN, CHAT, EVAL, SERVE, DIAGNOSE = COMMANDS
ANSWERING = (CHAT, EVAL, SERVE, DIAGNOSE)


@dataclass(frozen=True)
class Seam:
    """One name that the plugin relies on.

    Attributes:
        module: the module that has it, in llava or transformers.
        attribute: its name there, dotted, for example "LlavaMetaForCausalLM.generate"; `__main__` is the block that
            runs when the module is started as a program.
        purpose: what the name does, or what the plugin does with it, as the end of a sentence that begins with it.
        stops: the commands that cannot do their work without it, of `COMMANDS`.
    """

    module: str
    attribute: str
    purpose: str
    stops: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


def _seams(module: str, stops: tuple[str, ...], purposes: dict[str, str]) -> tuple[Seam, ...]:
    return tuple(Seam(module, attribute, purpose, stops) for attribute, purpose in purposes.items())


# The class whose constructor loads a model for the server, and whose methods stream its answers.
_WORKER = "ModelWorker"
SEAMS = (
    *_seams(
        "llava.train.train",
        (TRAIN, PLAN),
        {
            "train": "is the training that the plugin extends",
            "ModelArguments": "declares flags of a training",
            "DataArguments": "declares flags of a training",
            "TrainingArguments": "gets the flags of the tuning modes",
            "preprocess": "turns samples into tokens, which are counted",
            "preprocess_multimodal": "turns samples into tokens, which are counted",
            "LazySupervisedDataset.__init__": "reads the data file, which is checked",
            "LLaVATrainer": "attaches the adapter, saves and resumes it",
            "transformers": "loads the tokenizer, of whichever language model",
            "DataCollatorForSupervisedDataset.__call__": "makes the attention mask",
            "safe_save_model_for_hf_trainer": "writes the adapter instead of the whole model",
        },
    ),
    *_seams(
        "llava.train.train",
        (TRAIN, DIAGNOSE),
        {
            "LazySupervisedDataset": "reads the samples, which are checked",
            "DataCollatorForSupervisedDataset": "makes a batch of samples",
        },
    ),
    *_seams(
        "llava.model.builder",
        (LOAD, *ANSWERING),
        {
            "load_pretrained_model": "loads an adapter's base, then the adapter",
            "AutoTokenizer": "loads the tokenizer, of whichever language model",
        },
    ),
    *_seams(
        "llava.mm_utils",
        (LOAD, *ANSWERING),
        {"get_model_name_from_path": "gives an adapter a name that LLaVA's rules understand"},
    ),
    *_seams(
        "llava.model.llava_arch",
        (TRAIN, LOAD, *ANSWERING),
        {
            "LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal": "tells which tokens are visual",
            "LlavaMetaForCausalLM": "makes a LLaVA of a language model",
            "LlavaMetaForCausalLM.encode_images": "goes into LLaVAs of other language models",
            "LlavaMetaModel": "makes the decoder of a LLaVA of a language model's",
            "build_vision_tower": "builds vision towers that are components",
            "build_vision_projector": "builds connectors that are components",
        },
    ),
    *_seams(
        "llava.model.llava_arch",
        (TRAIN, *ANSWERING),
        {"LlavaMetaModel.mm_projector": "is the projector, which is trained and saved with the adapter"},
    ),
    *_seams(
        "llava.model.llava_arch",
        (TRAIN, LOAD, DIAGNOSE, *ANSWERING),
        {"LlavaMetaForCausalLM.get_vision_tower": "finds the vision tower of a loaded model"},
    ),
    *_seams(
        "llava.model.multimodal_encoder.builder",
        (TRAIN, PLAN),
        {"build_vision_tower": "says whether LLaVA knows a vision tower"},
    ),
    *_seams(
        "llava.model.language_model.llava_llama",
        (TRAIN, LOAD, *ANSWERING),
        {
            "LlavaLlamaForCausalLM.forward": "opens the token map",
            "LlavaLlamaForCausalLM.generate": "opens the token map",
            "LlavaLlamaForCausalLM": "gives way to the LLaVA of another language model, which is made like it",
            "LlavaLlamaForCausalLM.prepare_inputs_for_generation": "goes into LLaVAs of other language models",
        },
    ),
    *_seams(
        "llava.model.language_model.llava_llama",
        (TRAIN, *ANSWERING),
        {"LlavaLlamaForCausalLM.get_model": "gives access to the projector"},
    ),
    *_seams(
        "llava.model.multimodal_encoder.clip_encoder",
        (TRAIN, *ANSWERING),
        {"CLIPVisionTower.config": "tells how many tokens an image becomes"},
    ),
    *_seams(
        "llava.model.multimodal_projector.builder",
        (TRAIN, PLAN),
        {"build_vision_projector": "builds the projector, whose parameters and memory are counted"},
    ),
    *_seams("llava.constants", ANSWERING, {"IMAGE_TOKEN_INDEX": "stands for an image among the ids of a prompt"}),
    *_seams(
        "llava.constants",
        (TRAIN, CHAT, EVAL, SERVE, DIAGNOSE),
        {
            "DEFAULT_IMAGE_TOKEN": "stands for an image in the text of a prompt",
            "DEFAULT_IM_START_TOKEN": "stands before an image in a prompt",
            "DEFAULT_IM_END_TOKEN": "stands behind an image in a prompt",
        },
    ),
    *_seams("llava.constants", (SERVE,), {"LOGDIR": "is the folder into which the web page writes"}),
    *_seams(
        "llava.conversation",
        (TRAIN, CHAT, EVAL, SERVE, DIAGNOSE),
        {"conv_templates": "holds the conversation templates"},
    ),
    *_seams("llava.conversation", (TRAIN, DIAGNOSE), {"default_conversation": "is the template that a training uses"}),
    *_seams(
        "llava.conversation",
        (TRAIN, SERVE),
        {"Conversation.version": "says how a training reads turns"},
    ),
    *_seams(
        "llava.conversation",
        (CHAT, EVAL, SERVE, DIAGNOSE),
        {
            "Conversation": "is what templates of other language models are made like",
            "SeparatorStyle.PLAIN": "is that of captions, which have no turns",
            "Conversation.roles": "names who speaks",
            "Conversation.append_message": "adds a message",
            "Conversation.copy": "begins a conversation in a template",
            "Conversation.get_prompt": "writes a conversation as a prompt",
        },
    ),
    *_seams(
        "llava.conversation",
        (CHAT, SERVE),
        {
            "Conversation.messages": "holds what was said",
            "Conversation.offset": "counts the messages that a template brings",
            "Conversation.sep": "ends an answer",
            "Conversation.sep2": "ends an answer",
            "Conversation.sep_style": "says which of the two ends an answer",
            "SeparatorStyle.SINGLE": "says which of the two ends an answer",
            "SeparatorStyle.MPT": "says which of the two ends an answer",
        },
    ),
    *_seams(
        "llava.mm_utils",
        (CHAT, EVAL, SERVE, DIAGNOSE),
        {
            "tokenizer_image_token": "turns a prompt into ids",
            "get_anyres_image_grid_shape": "tells how many tiles an image becomes",
        },
    ),
    *_seams("llava.mm_utils", (LOAD, *ANSWERING), {"process_images": "prepares images for the vision tower"}),
    *_seams("llava.utils", (CHAT,), {"disable_torch_init": "saves time when a model is loaded"}),
    *_seams("llava.utils", (SERVE,), {"handler": "is where LLaVA's worker writes its log"}),
    *_seams(
        "llava.serve.model_worker",
        (SERVE,),
        {
            "logger": "is the worker's log",
            "worker_id": "is the worker's name in its log",
            _WORKER: "answers the requests",
            f"{_WORKER}.model": "is the model that answers",
            f"{_WORKER}.tokenizer": "is the model's tokenizer",
            f"{_WORKER}.image_processor": "prepares the images of a request",
            f"{_WORKER}.is_multimodal": "says whether the model takes images",
            f"{_WORKER}.model_name": "is the name under which the model is listed",
            f"{_WORKER}.get_status": "tells the controller which models there are",
            f"{_WORKER}.get_queue_length": "tells the controller how many requests wait",
        },
    ),
    *_seams("llava.serve.controller", (SERVE,), {"__main__": "runs the controller"}),
    *_seams("llava.serve.controller", (SERVE,), {"app": "answers the controller's requests"}),
    *_seams("llava.serve.gradio_web_server", (SERVE,), {"__main__": "runs the web page"}),
    *_seams(
        "llava.serve.gradio_web_server",
        (SERVE,),
        {
            "logger": "is the web page's log",
            "conv_templates": "holds the templates of the web page's conversations",
            "http_bot": "begins a conversation in one of them",
        },
    ),
    *_seams("transformers.trainer", (TRAIN,), OF_TRAINER),
    *_seams("transformers.pytorch_utils", (TRAIN,), {"ALL_LAYERNORM_LAYERS": "is what LLaVA's trainer imports"}),
)


def require(module: ModuleType, attribute: str) -> Any:
    """Return the attribute (dotted) of an imported module.

    Raises:
        UpstreamError: it is not there; the message names the seam and the file that was searched.
    """
    value: Any = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            where = getattr(module, "__file__", None) or "an unknown place"
            raise UpstreamError(
                f"this LLaVA has no {module.__name__}.{attribute}, which the plugin needs (searched {where}). It is "
                "probably a fork or a version that the plugin does not know; `llava-steering doctor` lists every name "
                "that the plugin needs, and which commands work without the missing ones."
            )
        value = getattr(value, name)
    return value


def missing_seams(llava: Path) -> list[Seam]:
    """Return the seams that are not in the source of llava and of this Python's transformers.

    Args:
        llava: the folder of the package. Neither it nor transformers is imported.

    Raises:
        UpstreamError: a file cannot be parsed.
    """
    packages = {"llava": llava, "transformers": package_folder("transformers")}
    names: dict[str, set[str]] = {}
    for module in {seam.module for seam in SEAMS}:
        package = packages[module.partition(".")[0]]
        source = None if package is None else module_file(package, module)
        names[module] = set() if source is None else defined_names(source)
    return [seam for seam in SEAMS if seam.attribute not in names[seam.module]]
