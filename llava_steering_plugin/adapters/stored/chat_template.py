"""The chat template of an adapter, for those who have nothing of LLaVA installed."""

from __future__ import annotations

from llava_steering_plugin.adapters.stored.locate import AdapterSource, locate
from llava_steering_plugin.errors import AdapterError


def chat_template_of(adapter: AdapterSource) -> str:
    """Return the chat template, in Jinja, that writes the prompts an adapter was trained with in LLaVA.

        processor.apply_chat_template(messages, chat_template=chat_template_of("checkpoints/pets"))

    Args:
        adapter: folder or hub id, or the adapter as it was read.

    Raises:
        AdapterError: not found or damaged; or it holds no chat template, because transformers trained it or a version
            of this package before 0.2.
    """
    folder = locate(adapter)
    config = folder.config
    if config.chat_template is not None:
        return config.chat_template
    if config.conversation is None:
        raise AdapterError(
            f"the adapter in {folder.path} holds no chat template: it was not trained with a conversation template of "
            "LLaVA's. Use the one of the processor that it was trained with."
        )
    raise AdapterError(
        f"the adapter in {folder.path} was trained with LLaVA's conversation template {config.conversation}, and holds "
        "no chat template for it. `llava-steering export BASE DST --conversation "
        f"{config.conversation}` writes it into the folder of the base."
    )
