"""Imports LLaVA's model worker without what its import does to a process."""

from __future__ import annotations

import contextlib
import logging
import sys

from llava import utils as llava_utils

# Importing upstream's worker would turn standard output and error into log records and open a log file in the current
# folder. Keep both as they are.
llava_utils.handler = llava_utils.handler or logging.NullHandler()
with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
    from llava.serve import model_worker as model_worker
model_worker.logger.setLevel(logging.WARNING)  # otherwise it logs a line for each heart beat
