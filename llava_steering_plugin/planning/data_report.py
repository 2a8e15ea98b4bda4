"""Sum up what a check of a data file has found."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llava_steering_plugin.training.data.sample_checks import KINDS, Defect

if TYPE_CHECKING:
    from llava_steering_plugin.upstream.text.tokens import TokenCounter

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Problem:
    """Names a bad sample and one of its defects."""

    index: int
    id: Any
    kind: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """Holds what a check of one sample has found.

    Attributes:
        id: of the sample; None: it has none.
        tokens: how long the sample is; None: not counted.
        learned: tokens of answers that are left for the loss.
    """

    id: Any
    pictured: bool
    defects: tuple[Defect, ...]
    tokens: int | None = None
    learned: int = 0


@dataclass
class DataReport:
    """Sums up a data file.

    Attributes:
        file: the data file.
        keep: how many problems of a kind are kept; None: all.
        file_problem: why the file cannot be read to its end, if so.
        kinds: in how many samples there is a defect of a kind.
        text_only: samples without an image.
        lengths: in tokens, of the samples that are not bad.
        cut: how many are longer than `longest`.
        nothing_left: how many of these samples have no token of an answer left for the loss; the first are named.
        repeated_ids: samples whose id another one before has.
    """

    file: str
    keep: int | None = None
    longest: int | None = None
    file_problem: str | None = None
    samples: int = 0
    bad: int = 0
    text_only: int = 0
    without_id: int = 0
    repeated_ids: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    lengths: array[int] = field(default_factory=lambda: array("L"))
    cut: int = 0
    nothing_left: int = 0
    first_with_nothing_left: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _ids: set[int] = field(default_factory=set)

    @property
    def sound(self) -> bool:
        """Return whether LLaVA can be trained on all samples."""
        return not self.bad and self.file_problem is None

    def add(self, finding: Finding) -> None:
        """Add what has been found in the next sample."""
        index, self.samples = self.samples, self.samples + 1
        self.text_only += not finding.pictured
        self._note_id(finding.id)
        self.bad += bool(finding.defects)
        for kind in {defect.kind for defect in finding.defects}:
            self.kinds[kind] += 1
        for defect in finding.defects:
            if self.keep is None or self.kinds[defect.kind] <= self.keep:
                self.problems.append(Problem(index, finding.id, defect.kind, defect.reason))
        if finding.tokens is not None:
            self.lengths.append(finding.tokens)
            self.cut += self.longest is not None and finding.tokens > self.longest
            if not finding.learned:
                self.nothing_left += 1
                if self.keep is None or self.nothing_left <= self.keep:
                    self.first_with_nothing_left.append(index)

    def _note_id(self, identity: Any) -> None:
        if identity is None:
            self.without_id += 1
            return
        key = hash(repr(identity))  # not the ids themselves: there may be millions
        self.repeated_ids += key in self._ids
        self._ids.add(key)

    def percentiles(self) -> dict[str, int]:
        """Return how long samples are, by share: half of them are no longer than the value at "50"."""
        ordered = sorted(self.lengths)
        return {str(share): ordered[-(-len(ordered) * share // 100) - 1] for share in PERCENTILES} if ordered else {}

    def as_json(self, counter: TokenCounter | None) -> dict[str, Any]:
        """Return the report for `--json`."""
        tokens = counter and {
            "model_max_length": self.longest,
            "image_tokens": counter.image_tokens,
            "counted": len(self.lengths),
            "mean": round(sum(self.lengths) / len(self.lengths), 1) if self.lengths else None,
            "percentiles": self.percentiles(),
            "longest": max(self.lengths, default=None),
            "cut": self.cut,
            "nothing_left": self.nothing_left,
            "nothing_left_indices": self.first_with_nothing_left,
        }
        return {
            "file": self.file,
            "file_problem": self.file_problem,
            "samples": self.samples,
            "bad": self.bad,
            "kinds": {kind: self.kinds[kind] for kind in KINDS if self.kinds[kind]},
            "problems": [vars(problem) for problem in self.problems],
            "text_only": self.text_only,
            "text_only_share": round(self.text_only / self.samples, 4) if self.samples else None,
            "without_id": self.without_id,
            "repeated_ids": self.repeated_ids,
            "tokens": tokens,
            "notes": self.notes,
        }
