"""Finding LLaVA (`checkout/find.py`), writing the block into it, and taking it out again."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_checkout import UPSTREAM_INIT, add_distribution, make_checkout, run_python

from llava_steering_plugin.checkout.find import distribution_of, find_llava, git_commit, other_llavas
from llava_steering_plugin.checkout.patch import BEGIN, BLOCK, State, entry_point_problem, patch, state, unpatch
from llava_steering_plugin.errors import UpstreamError

PATCH_FILE = Path(__file__).parents[2] / "patches" / "llava-init.patch"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "LLaVA")


def cli(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "llava_steering_plugin", *arguments, path=path, cwd=cwd)


class TestBytes:
    @pytest.mark.parametrize(
        "content",
        [
            UPSTREAM_INIT,
            b"from .model import A\r\nfrom .model import B\r\n",
            b"no line end",
            b"first\r\nno line end",
            b"mixed\r\nends\n",
            b"",
            b"\n\n\n",
            "# Umlaute: äöü\n".encode("latin-1"),
        ],
    )
    def test_unpatch_restores_every_byte(self, tmp_path: Path, content: bytes) -> None:
        llava = find_llava(make_checkout(tmp_path, content))
        assert patch(llava)
        assert state(llava) is State.PATCHED
        assert llava.init.read_bytes().startswith(content)
        assert unpatch(llava)
        assert llava.init.read_bytes() == content

    @settings(max_examples=60, deadline=None)
    @given(
        content=st.lists(st.sampled_from([b"a", b"\n", b"\r\n", b"\r", b"#", b"\xff", b"\0"]), max_size=12).map(
            b"".join
        )
    )
    def test_unpatch_restores_every_byte_of_any_file(self, content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            llava = find_llava(make_checkout(Path(folder) / "LLaVA", content))
            assert patch(llava) and unpatch(llava)
            assert llava.init.read_bytes() == content

    def test_block_uses_the_line_ends_of_the_file(self, tmp_path: Path) -> None:
        llava = find_llava(make_checkout(tmp_path, b"import os\r\n"))
        patch(llava)
        assert llava.init.read_bytes().count(b"\n") == llava.init.read_bytes().count(b"\r\n")

    def test_a_patched_file_whose_line_ends_were_converted_can_still_be_unpatched(self, checkout: Path) -> None:
        llava = find_llava(checkout)
        patch(llava)
        llava.init.write_bytes(llava.init.read_bytes().replace(b"\n", b"\r\n"))
        assert unpatch(llava)
        assert llava.init.read_bytes() == b"loaded = True\r\n"

    def test_lines_added_below_the_block_survive_and_are_not_glued_to_a_line_without_end(self, tmp_path: Path) -> None:
        llava = find_llava(make_checkout(tmp_path, b"first = 1"))
        patch(llava)
        with llava.init.open("ab") as file:
            file.write(b"second = 2\n")
        assert unpatch(llava)
        assert llava.init.read_bytes() == b"first = 1\nsecond = 2\n"

    def test_mode_bits_and_links_are_kept(self, checkout: Path, tmp_path: Path) -> None:
        llava = find_llava(checkout)
        elsewhere = tmp_path / "real_init.py"
        llava.init.rename(elsewhere)
        llava.init.symlink_to(elsewhere)
        elsewhere.chmod(0o640)
        patch(llava)
        assert llava.init.is_symlink()
        assert elsewhere.stat().st_mode & 0o777 == 0o640
        assert BEGIN in elsewhere.read_text()
        assert [file.name for file in llava.package.iterdir() if "init" in file.name] == ["__init__.py"]


def test_patch_gives_the_file_that_git_apply_makes_of_the_readable_patch(pristine_llava: Path, tmp_path: Path) -> None:
    content = (pristine_llava / "llava" / "__init__.py").read_bytes()
    if content != UPSTREAM_INIT:
        pytest.skip("this fork's llava/__init__.py is another one than upstream's, which the patch file is for")
    by_git, by_us = make_checkout(tmp_path / "git", content), make_checkout(tmp_path / "us", content)
    subprocess.run(["git", "apply", str(PATCH_FILE)], cwd=by_git, check=True)
    patch(find_llava(by_us))
    assert (by_git / "llava/__init__.py").read_bytes() == (by_us / "llava/__init__.py").read_bytes()
    assert state(find_llava(by_git)) is State.PATCHED


def test_patching_twice_changes_nothing_and_says_so(checkout: Path) -> None:
    first = cli("patch", path=[checkout], cwd=checkout.parent)
    content = (checkout / "llava/__init__.py").read_bytes()
    second = cli("patch", path=[checkout], cwd=checkout.parent)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "patched" in first.stdout and "already patched" in second.stdout
    assert (checkout / "llava/__init__.py").read_bytes() == content


def test_unpatching_what_is_not_patched_changes_nothing_and_says_so(checkout: Path) -> None:
    done = cli("unpatch", path=[checkout], cwd=checkout.parent)
    assert done.returncode == 0
    assert "not patched" in done.stdout


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("except Exception", "except ImportError"),
        lambda text: text.replace("# <<< llava plugins <<<\n", ""),
        lambda text: text + BLOCK,
    ],
    ids=["a line changed", "the end removed", "a second block"],
)
def test_a_block_edited_by_hand_is_left_alone_with_a_clear_message(checkout: Path, edit) -> None:
    llava = find_llava(checkout)
    patch(llava)
    llava.init.write_text(edit(llava.init.read_text()))
    content = llava.init.read_bytes()
    assert state(llava) is State.EDITED
    for action in (patch, unpatch):
        with pytest.raises(UpstreamError, match="edited") as caught:
            action(llava)
        assert str(llava.init) in str(caught.value)
    assert llava.init.read_bytes() == content


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A checkout that this process cannot write to, also when the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        root = make_checkout(Path(folder) / "LLaVA")
        Path(folder).chmod(0o755)
        (root / "llava").chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
            yield root
            os.seteuid(0)
        else:
            yield root
        (root / "llava").chmod(0o755)


def test_without_write_permission_nothing_changes_and_the_launcher_is_named(unwritable: Path) -> None:
    llava = find_llava(unwritable)
    with pytest.raises(UpstreamError, match=r"llava_steering_plugin\.launch"):
        patch(llava)
    assert state(llava) is State.CLEAN
    assert sorted(file.name for file in llava.package.iterdir()) == ["__init__.py", "model", "serve", "train"]


class TestFinding:
    @pytest.fixture
    def only(self, monkeypatch: pytest.MonkeyPatch):
        """Lets Python's path consist of the given folders; what is imported already stays, llava excepted."""

        def choose(*folders: Path) -> None:
            monkeypatch.delitem(sys.modules, "llava", raising=False)
            monkeypatch.setattr(sys, "path", [str(folder) for folder in folders])

        return choose

    @pytest.mark.parametrize("below", ["", "llava"])
    def test_a_path_may_be_the_checkout_or_its_llava_folder(self, checkout: Path, below: str) -> None:
        assert find_llava(checkout / below).package == checkout / "llava"

    def test_a_path_without_llava_is_an_error_that_names_what_was_looked_for(self, tmp_path: Path) -> None:
        done = cli("patch", "--llava", str(tmp_path), path=[], cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("UpstreamError: no LLaVA in ")
        assert "builder.py" in done.stderr and "Traceback" not in done.stderr

    def test_no_llava_is_an_error_that_says_how_to_name_one(self, only, tmp_path: Path, monkeypatch) -> None:
        only(tmp_path)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UpstreamError, match="--llava PATH_OF_CHECKOUT"):
            find_llava()

    def test_a_checkout_in_the_current_folder_that_is_not_on_the_path_is_pointed_out(
        self, only, checkout: Path, tmp_path: Path, monkeypatch
    ) -> None:
        only(tmp_path)
        monkeypatch.chdir(checkout)
        with pytest.raises(UpstreamError, match=r"use `--llava \.`"):
            find_llava()

    def test_another_package_called_llava_is_not_taken_for_llava(self, only, tmp_path: Path) -> None:
        (tmp_path / "llava").mkdir()
        (tmp_path / "llava" / "__init__.py").touch()
        only(tmp_path)
        with pytest.raises(UpstreamError, match="is not LLaVA"):
            find_llava()

    def test_of_two_llavas_the_imported_one_is_used_and_the_other_named(self, checkout: Path, tmp_path: Path) -> None:
        other = make_checkout(tmp_path / "other")
        done = cli("patch", path=[checkout, other], cwd=tmp_path)
        assert done.returncode == 0
        assert f"patched {checkout / 'llava/__init__.py'}" in done.stdout
        assert f"another LLaVA, left as it is: {other / 'llava'}" in done.stdout
        assert state(find_llava(other)) is State.CLEAN

    def test_the_llava_that_import_finds_is_named_when_another_was_chosen(self, only, checkout: Path, tmp_path) -> None:
        imported = make_checkout(tmp_path / "imported")
        only(imported)
        assert [(other.package, other.found_by) for other in other_llavas(find_llava(checkout))] == [
            (imported / "llava", "what `import llava` finds")
        ]

    def test_an_installed_llava_belongs_to_its_distribution_and_a_plain_checkout_to_none(
        self, only, checkout: Path, tmp_path: Path
    ) -> None:
        installed = make_checkout(tmp_path / "site")
        (add_distribution(installed, "llava-torch", "1.2.2") / "top_level.txt").write_text("llava\n")
        only(installed)
        found = distribution_of(find_llava())
        assert found is not None and (found.metadata["Name"], found.version) == ("llava-torch", "1.2.2")
        assert distribution_of(find_llava(checkout)) is None

    def test_an_editable_llava_belongs_to_its_distribution(self, only, checkout: Path, tmp_path: Path) -> None:
        info = add_distribution(tmp_path / "site", "llava", "1.2.2")
        (info / "top_level.txt").write_text("llava\n")
        (info / "direct_url.json").write_text(f'{{"url": "{checkout.as_uri()}", "dir_info": {{"editable": true}}}}')
        only(tmp_path / "site", checkout)
        found = distribution_of(find_llava())
        assert found is not None and found.version == "1.2.2"

    def test_the_commit_is_that_of_the_checkout_and_not_of_a_repository_around_it(self, checkout: Path) -> None:
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(checkout)]
        subprocess.run([*git, "init", "-q"], check=True)
        (checkout / "README").touch()
        subprocess.run([*git, "add", "README"], check=True)
        subprocess.run([*git, "commit", "-qm", "around"], check=True)
        assert git_commit(find_llava(checkout)) is None
        subprocess.run([*git, "add", "llava"], check=True)
        subprocess.run([*git, "commit", "-qm", "tracked"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        assert git_commit(find_llava(checkout)) == head


class TestEntryPoint:
    @pytest.mark.parametrize("suffix", ["dist-info", "egg-info"])
    def test_a_stale_distribution_that_hides_the_entry_point_is_named_and_nothing_is_patched(
        self, checkout: Path, tmp_path: Path, suffix: str
    ) -> None:
        add_distribution(tmp_path / "stale", "llava-steering-plugin", "0.0.1", suffix=suffix)
        done = cli("patch", path=[tmp_path / "stale", checkout], cwd=tmp_path)
        assert done.returncode == 1
        assert "llava-steering-plugin 0.0.1 in " + str(tmp_path / "stale") in done.stderr
        assert "pip uninstall" in done.stderr and "Traceback" not in done.stderr
        assert state(find_llava(checkout)) is State.CLEAN

    def test_a_package_that_is_only_on_the_path_is_told_to_be_installed(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        assert "pip install llava-steering-plugin" in (entry_point_problem() or "")

    def test_the_installed_plugin_is_visible(self) -> None:
        assert entry_point_problem() is None


class TestBlock:
    PLUGIN = "[llava.plugins]\n{name} = {name}:start\n"

    def run(self, checkout: Path, plugins: dict[str, str]) -> subprocess.CompletedProcess[str]:
        for name, source in plugins.items():
            add_distribution(checkout, name, "1.0", self.PLUGIN.format(name=name))
            (checkout / f"{name}.py").write_text(source)
        patch(find_llava(checkout))
        # -I -S: without this environment's own packages, so also without this plugin.
        code = f"import sys; sys.path.insert(0, {str(checkout)!r}); import llava; print(llava.loaded)"
        return run_python("-I", "-S", "-c", code, path=[], cwd=checkout)

    def test_without_any_plugin_llava_works_as_before(self, checkout: Path) -> None:
        done = self.run(checkout, {})
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr

    def test_every_plugin_is_called_after_llava_itself_is_loaded(self, checkout: Path) -> None:
        source = "def start():\n    import llava\n    print(__name__, llava.loaded)\n"
        done = self.run(checkout, {"one": source, "two": source})
        assert sorted(done.stdout.split("\n")) == ["", "True", "one True", "two True"], done.stderr

    def test_a_broken_plugin_stops_the_import_and_is_named_with_the_way_out(self, checkout: Path) -> None:
        done = self.run(checkout, {"broken": "def start():\n    raise RuntimeError('out of order')\n"})
        assert done.returncode != 0 and "True" not in done.stdout
        assert "llava plugin 'broken' (broken:start) failed: out of order" in done.stderr
        assert "llava-steering unpatch" in done.stderr
