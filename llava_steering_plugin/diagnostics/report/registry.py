"""The measures that a report draws: where their results are, how they are made, and which section shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_steering_plugin.diagnostics.report.comparison import comparison_section
from llava_steering_plugin.diagnostics.report.during import during_section
from llava_steering_plugin.diagnostics.report.image import image_section
from llava_steering_plugin.diagnostics.report.interference import interference_section
from llava_steering_plugin.diagnostics.report.modality import modality_section
from llava_steering_plugin.diagnostics.report.parts import Run, Section
from llava_steering_plugin.diagnostics.report.routing import routing_section
from llava_steering_plugin.diagnostics.report.steering import steering_section
from llava_steering_plugin.diagnostics.report.training import training_section


@dataclass(frozen=True)
class Measure:
    """Holds what a report knows of a measure.

    Attributes:
        file: the name of its results.
        made_by: the command that writes them.
        section: draws the results of one or more runs. What it raises of KeyError, TypeError, ValueError and
            IndexError means that a document has another form.
    """

    file: str
    made_by: str
    section: Callable[[Sequence[Run]], Section]


DURING, TRAINING = "diagnostics during training", "training"
# In the order in which a report shows them.
MEASURES = {
    "modality": Measure("modality.json", "llava-steering diagnose modality", modality_section),
    "image": Measure("image.json", "llava-steering diagnose image", image_section),
    "steering": Measure("steering.json", "llava-steering diagnose steering", steering_section),
    "interference": Measure("interference.json", "llava-steering diagnose interference", interference_section),
    "routing": Measure("routing.json", "llava-steering diagnose routing", routing_section),
    "comparison": Measure("results.json", "llava-steering compare", comparison_section),
    DURING: Measure("diagnostics.jsonl", "a training with --steering_diagnostics_steps", during_section),
    TRAINING: Measure("trainer_state.json", "any training of LLaVA's", training_section),
}
