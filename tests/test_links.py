"""README, CONTRIBUTING and docs/: no dead link, no file, module or flag that is not there, no line that is too long.

Nothing is fetched: links to other sites are only looked at for their form.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_steering_plugin import MixLoRA, MoReS

ROOT = Path(__file__).parents[1]
PACKAGE = "llava_steering_plugin"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").rglob("*.md")])
WIDTH = 100

FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]*)\)")
# What looks like a file or a folder: `modes/mores.py`, `scripts/finetune_*.sh`, `tests/gpu`, `hooks/`.
FILE = re.compile(
    r"[\w.*-]+(/[\w.*-]+)*\.(cfg|json|md|patch|png|py|sh|toml|txt)|(docs|patches|scripts|tests)/[\w./*-]+|[\w/]+/"
)
# The same without backticks: in blocks of code, where `./scripts` would be LLaVA's.
IN_CODE = re.compile(r"(?<![./\w-])(?:docs|patches|scripts|tests)/[\w./*-]+")
# Files that the pages name and this repository lacks: LLaVA's, DeepSpeed's, those that commands write.
FOREIGN = {
    "adapter_config.json",
    "llava_steering_config.json",
    "steering_state.json",
    "config.json",
    "llava_export.json",
    "preprocessor_config.json",
    "processor_config.json",
    "intervention_config.json",
    "image.json",
    "image.png",
    "interference.json",
    "interference.png",
    "results.json",
    "modality-heads.png",
    "modality.json",
    "modality.png",
    "mores_pos_configs.json",
    "report.json",
    "report.md",
    "results.md",
    "results.png",
    "routing-tsne.png",
    "routing-use.png",
    "routing.json",
    "skipped_samples.json",
    "steering.json",
    "train.py",
    "train_mem.py",
    "trainer_state.json",
    "zero2.json",
    "zero3.json",
    "zero3_offload.json",
}
FOREIGN_FOLDERS = ("diagnosis/", "llava/", "mores/", "language_model/", "connector/", "compare/")


# Pages of which most file names are others': there, only what lies in a folder of ours is looked for.
LISTS_OF_OTHERS = {"benchmarks-data.md"}
# Files of benchmarks: what `evaluation/` names, it reads, or cites as a rule's source.
OF_BENCHMARKS = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / PACKAGE / "evaluation").rglob("*.py"))


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (name := slug + (f"-{number}" if number else "")) in found:
            number += 1
        found.add(name)
    return found


def dead_links(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead nowhere."""
    for target in LINK.findall(CODE_SPAN.sub("code", prose(page))):
        if re.match(r"\w+:", target):
            if not re.fullmatch(r"https://[\w.-]+\.\w+(/\S*)?", target):
                yield target
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            yield target


def dead_paths(page: Path) -> set[str]:
    """Return the files of this repository that a page names, in backticks or in its code, and that are not there."""
    words = {word for span in CODE_SPAN.findall(prose(page)) for word in span.split() if FILE.fullmatch(word)}
    if page.name in LISTS_OF_OTHERS:
        words = {word for word in words if word.startswith(("docs/", "patches/", "scripts/", "tests/"))}
    words -= {word for word in words if word in FOREIGN or word.startswith(FOREIGN_FOLDERS)}
    words -= {word for word in words if re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.]*\w)", OF_BENCHMARKS)}
    words |= {word.rstrip(".") for word in IN_CODE.findall(page.read_text(encoding="utf-8"))}
    return {word for word in words if not _is_there(word.rstrip("/"), page)}


def _is_there(name: str, page: Path) -> bool:
    if any(any(base.glob(name)) for base in (ROOT, ROOT / PACKAGE, page.parent)):
        return True
    return "/" not in name and _somewhere(name)


def _somewhere(name: str) -> bool:
    """Whether a file of that name is in the package, the scripts, the tests or the docs."""
    folders = (ROOT / folder for folder in (PACKAGE, "scripts", "tests", "docs"))
    return any(any(folder.rglob(name)) for folder in folders)


def dead_modules(text: str) -> Iterator[str]:
    """Yield the dotted names below the package that are neither a module nor a name in one."""
    for name in sorted(set(re.findall(rf"\b{PACKAGE}(?:\.\w+)+", text))):
        here, *rest = ROOT / PACKAGE, *name.split(".")[1:]
        while rest and (here / rest[0]).is_dir():
            here /= rest.pop(0)
        file = here / "__init__.py"
        if rest and (here / f"{rest[0]}.py").exists():
            file = here / f"{rest.pop(0)}.py"
        if rest and not re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")):
            yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
class TestAPage:
    def test_has_no_dead_link(self, page: Path) -> None:
        assert list(dead_links(page)) == []

    def test_names_no_file_that_is_not_there(self, page: Path) -> None:
        assert dead_paths(page) == set()

    def test_names_no_module_that_is_not_there(self, page: Path) -> None:
        assert list(dead_modules(page.read_text(encoding="utf-8"))) == []

    def test_has_short_lines_outside_of_tables(self, page: Path) -> None:
        lines = page.read_text(encoding="utf-8").splitlines()
        wide = [line for line in lines if len(line) > WIDTH and not line.startswith("|")]
        assert wide == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = LINK.findall(prose(page))
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links if "://" not in link]
    assert set(PAGES) - reached == set()


def test_the_readme_is_short_and_names_the_command_of_the_tests() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert "scripts/test.sh" in text
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_page_that_the_code_names_is_there() -> None:
    sources = [file for folder in (PACKAGE, "scripts", "tests") for file in (ROOT / folder).rglob("*.*")]
    named = {
        (name, file.relative_to(ROOT))
        for file in sources
        if file.suffix in (".py", ".sh")
        for name in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text(encoding="utf-8"))
    }
    assert named
    assert [(name, file) for name, file in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[here](#a-heading), [there](other.md#another-one), ![a picture](picture.png)", []),
        ("[a missing page](missing.md)", ["missing.md"]),
        ("[a missing heading](#heading) and [another](other.md#a-heading)", ["#heading", "other.md#a-heading"]),
        ("![a missing\npicture](missing.png)", ["missing.png"]),
        ("[a link with `code`](missing.md), and `[no link](missing.md)`", ["missing.md"]),
        ("[a site](https://example.org/page), [none](https://nowhere)", ["https://nowhere"]),
    ],
)
def test_what_a_dead_link_is(text: str, dead: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Another: one!\n")
    (tmp_path / "picture.png").touch()
    page = tmp_path / "page.md"
    page.write_text(f"# A `heading`\n\n```\n# no heading\n[no link](missing.md)\n```\n\n{text}\n")
    assert list(dead_links(page)) == dead


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("`modes/base.py`, `llava_steering_plugin/errors.py`, `scripts/finetune_*.sh`, `hooks/`, `test_links.py`", []),
        ("`modes/none.py`, `scripts/nothing_*.sh`, `nowhere/`, `tests/none`, `none.py`", None),
        ("`llava/train/train.py`, `train_mem.py`, `w / 2`, `gain.scale`, `checkpoint-N`", []),
        ("```\npython scripts/none.py tests/test_links.py ./scripts/zero2.json\n```", ["scripts/none.py"]),
    ],
)
def test_what_a_dead_path_is(text: str, dead: list[str] | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert dead_paths(page) == (set(CODE_SPAN.findall(text)) if dead is None else set(dead))


def test_what_a_dead_module_is() -> None:
    there = f"{PACKAGE}.launch {PACKAGE}.modes {PACKAGE}.modes.base.Mode {PACKAGE}.attach"
    gone = f"{PACKAGE}.nosuchname {PACKAGE}.modes.nosuchname"
    assert list(dead_modules(f"{there} {gone}")) == sorted(gone.split())


def test_a_foreign_file_is_named_somewhere() -> None:
    pages = "".join(prose(page) for page in PAGES)
    assert [name for name in (*FOREIGN, *FOREIGN_FOLDERS) if name not in pages] == []


# Flags of programs that are neither ours, nor LLaVA's, nor transformers' Trainer's.
OF_LAUNCHERS = set(
    "hostfile launcher master_addr module nnodes no_ssh node_rank nproc_per_node num_accelerators rdzv_backend "
    "rdzv_endpoint num_processes".split()
)
OF_LMMS_EVAL = set("model model_args tasks include_path batch_size gen_kwargs log_samples output_path".split())
OF_VLLM = set(
    "enable_lora lora_target_modules max_lora_rank max_loras max_cpu_loras lora_modules pipeline_parallel_size "
    "prefill_context_parallel_size tensor_parallel_size data_parallel_size data_parallel_address enable_dbo "
    "speculative_config enforce_eager".split()
)
FLAG = re.compile(r"(?<![\w-])--([A-Za-z]\w*(?:-\w+)*)")


def words_in(*places: Path) -> set[str]:
    """Return every identifier in Python and shell files; flags with underscores, as the options behind them are called.

    Args:
        places: files, or folders that are searched.
    """
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".sh"))
    return set(re.findall(r"\w+", text)) | {flag.replace("-", "_") for flag in FLAG.findall(text)}


def test_every_flag_that_the_pages_name_is_a_flag_of_some_program(llava_copies: Any) -> None:
    (transformers,) = importlib.util.find_spec("transformers").submodule_search_locations  # type: ignore[union-attr]
    sources = (ROOT / PACKAGE, ROOT / "scripts", ROOT / "tests" / "conftest.py", llava_copies.pristine)
    known = words_in(*sources, Path(transformers) / "training_args.py") | OF_LAUNCHERS | OF_LMMS_EVAL | OF_VLLM
    known |= {f"{mode.name}_{name}" for mode in (MoReS, MixLoRA) for name in mode().settings()}
    named = {(flag, page.name) for page in PAGES for flag in FLAG.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 100
    known |= {"gain_scale", "MODE_SETTING"}  # of an example, and of no mode in particular
    words = {(flag, page): flag.replace("-", "_") for flag, page in named}
    assert [place for place, word in words.items() if word not in known and word.removeprefix("no_") not in known] == []
