"""`launch --cpu`: what LLaVA says about CUDA means the CPU, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

from forks import Forks
from training_runs import subprocess_environment

pytest_plugins = ["fork_fixtures"]


def test_with_cpu_everything_that_upstream_says_about_cuda_means_the_processor(
    library_forks: Forks, tmp_path: Path
) -> None:
    builder = tmp_path / "llava" / "model" / "builder.py"
    builder.parent.mkdir(parents=True)
    (tmp_path / "llava" / "__init__.py").touch()
    builder.write_text(
        "def load_pretrained_model(model_path, model_base, model_name, device_map='auto', device='cuda', **kwargs):\n"
        "    return device, device_map, kwargs\n"
    )
    code = """
import os, torch
from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu
redirect_cuda_to_cpu()
from llava.model.builder import load_pretrained_model as load
x, layer = torch.ones(2), torch.nn.Linear(2, 2)
results = [
    x.cuda(), x.half().cuda(0, non_blocking=True), x.to("cuda"), x.to(0), x.to("cuda:1", torch.float16),
    x.to(torch.device("cuda")), x.to(device="cuda", non_blocking=True),
    x.to(dtype=torch.float16, device="cuda", non_blocking=True), x.to(x.half()),
]
assert {result.device.type for result in results} == {"cpu"}
in_half = [result.dtype == torch.float16 for result in results]
assert in_half == [False, True, False, False, True, False, False, True, True]
assert layer.cuda() is layer and layer.to("cuda") is layer and layer.to(device="cuda:0", dtype=torch.float64) is layer
assert layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float64
assert x.to("meta").device.type == "meta", "other devices are other devices"
torch.cuda.synchronize()
assert not torch.cuda.is_available()
assert load("path", None, "name") == ("cpu", "auto", {})
assert load("path", None, "name", device="cuda", load_4bit=True) == ("cpu", "auto", {"load_4bit": True})
assert load("path", None, "name", "auto", "cpu") == ("cpu", "auto", {})
"""
    done = library_forks.run("-c", code, cwd=tmp_path, env=subprocess_environment(tmp_path))
    assert done.returncode == 0, done.stderr


def test_a_loader_without_a_device_is_told_by_its_device_map(library_forks: Forks, tmp_path: Path) -> None:
    builder = tmp_path / "llava" / "model" / "builder.py"
    builder.parent.mkdir(parents=True)
    (tmp_path / "llava" / "__init__.py").touch()
    builder.write_text("def load_pretrained_model(model_path, device_map='auto'):\n    return device_map\n")
    code = """
from llava_steering_plugin.upstream.cuda_to_cpu import redirect_cuda_to_cpu
redirect_cuda_to_cpu()
from llava.model.builder import load_pretrained_model as load
assert load("path") == load("path", device_map="auto") == {"": "cpu"}
assert load("path", {"": "disk"}) == {"": "disk"}
"""
    done = library_forks.run("-c", code, cwd=tmp_path, env=subprocess_environment(tmp_path))
    assert done.returncode == 0, done.stderr
