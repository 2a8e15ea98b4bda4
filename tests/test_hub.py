"""A name that is no model's is refused after one question to the hub, with the folder that was meant (`hub`)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llava_steering_plugin.hub import absent, nearest_folder

CHECK = """
import sys
from llava_steering_plugin.inference.base_files import check_base
check_base(sys.argv[1])
"""


class Hub:
    """A hub that counts what it is asked, and drops the connection or says that it has nothing."""

    def __init__(self, answers: bool):
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.asked.append(self.path)
                if answers:
                    self.send_response(404 if self.path.strip("/") else 200)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def check(self, name: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Check a base of that name in `folder`, with this hub."""
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server.server_port}",
            "HF_HOME": str(folder / "hub"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        words = [sys.executable, "-c", CHECK, name]
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(params=[True, False], ids=["without the model", "out of reach"])
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    hub = Hub(request.param)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_mistyped_folder_is_refused_after_each_question_was_asked_once(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "llava-7b").mkdir(parents=True)
    ended = hub.check("checkpoints/lava-7b", tmp_path)
    last = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode and "there is no folder checkpoints/lava-7b" in last
    assert last.endswith("Did you mean checkpoints/llava-7b?")
    assert ("cannot be reached" in last) == (len(hub.asked) == 1)
    assert hub.asked and len(hub.asked) == len(set(hub.asked)), "the hub was asked the same again"


def test_the_nearest_folder_is_looked_for_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "llava-7b").mkdir(parents=True)
    (tmp_path / "checkpoints" / "pets").write_text("a file")
    assert nearest_folder("chekpoints/lava-7b", tmp_path) == "checkpoints/llava-7b"
    assert nearest_folder(str(tmp_path / "checkpoint" / "llava7b")) == str(tmp_path / "checkpoints" / "llava-7b")
    assert nearest_folder("checkpoints/pet", tmp_path) is None
    assert nearest_folder("elsewhere", tmp_path) is None


def test_a_path_that_is_no_name_on_the_hub_is_not_said_to_be_missing_there(tmp_path: Path) -> None:
    assert absent(str(tmp_path / "nothing")) == f"there is no folder {tmp_path / 'nothing'}."
    assert "of that name can be fetched from the hub" in absent("somebody/nothing", tmp_path)
