"""Register the import hooks: the entry point that a patched llava calls.

It runs at the end of `import llava`, in every process that uses LLaVA, so it imports neither torch nor llava.train.
Each hook loads the rest of the plugin when its module has been imported.
"""

from __future__ import annotations

import functools
import sys

from wrapt import register_post_import_hook

from llava_steering_plugin.upstream import startup

HOOKS = {
    "llava.conversation": "llava_steering_plugin.upstream.text.chat_templates:on_conversation_import",
    "llava.model.llava_arch": "llava_steering_plugin.upstream.model.components:on_arch_import",
    "llava.train.train": "llava_steering_plugin.upstream.train.training:on_train_import",
    "llava.model.builder": "llava_steering_plugin.upstream.model.loading:on_builder_import",
    "llava.mm_utils": "llava_steering_plugin.upstream.model.loading:on_mm_utils_import",
    "transformers.trainer": "llava_steering_plugin.upstream.train.newer_transformers:on_trainer_import",
}


@functools.cache  # once a process: a patched llava and `launch` may both call it
def install() -> None:
    """Register the import hooks; a hook whose module is already imported fires at once.

    It also looks at how the process was started, for the two programs of LLaVA that hooks do not reach because they run
    as `__main__`: see `startup`.

    Raises:
        SystemExit: train.py itself is the main program and a flag asks for a tuning mode.
    """
    startup.refuse_training_as_main(sys.orig_argv)
    for module, hook in HOOKS.items():
        register_post_import_hook(hook, module)
    startup.name_the_workers_model(sys.orig_argv, sys.argv)
