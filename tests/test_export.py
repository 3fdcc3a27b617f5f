"""Networks as files that run without this repository (common/tools/export.py)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensors import random, save_tiny_model

from common.modality import Recipe
from common.tools import export

README = Path(__file__).resolve().parent.parent / "README.md"


def export_tiny(folder, name):
    net = save_tiny_model(folder / "model.pt", Recipe(8, 2, size=32), ["walk", "run"], name)
    return net, export.main([f"{folder}/model.pt", f"{folder}/net.pt2"])


@pytest.mark.parametrize("name", ["resnet3d10-small", "i3d10", "tsm10", "r3d_10", "r2plus1d_10"])
def test_exported_networks_give_the_same_logits_for_any_batch_size(name, tmp_path):
    net, status = export_tiny(tmp_path, name)
    assert not status and sorted(os.listdir(tmp_path)) == ["model.pt", "net.pt2"]
    program = torch.export.load(tmp_path / "net.pt2").module()
    for B in (1, 5):
        x = random(B, 3, 8, 32, 32, seed=B)
        assert torch.allclose(program(x), net(x), rtol=1e-4, atol=1e-4)


def test_another_program_is_refused(tmp_path, monkeypatch, capsys):
    exported = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda net, *args, **options: exported(
        torch.nn.Sequential(net, torch.nn.Softmax(1)), *args, **options))  # fmt: skip
    assert export_tiny(tmp_path, "tsm10")[1] == 2 and os.listdir(tmp_path) == ["model.pt"]
    assert "model.pt gives other logits than the network" in capsys.readouterr().err


def test_the_code_of_the_readme_needs_torch_alone(tmp_path):
    export_tiny(tmp_path, "r3d_10")
    section = README.read_text().partition("## Leaving the package")[2]
    code = re.search("```python\n(.*?)```", section, re.S)[1].replace("NET.pt2", "net.pt2")
    before, after = "import sys, torch\nx = torch.rand(4, 3, 8, 32, 32)\n", "print(*sys.modules)\n"
    process = subprocess.run([sys.executable, "-c", before + code + after], cwd=tmp_path, capture_output=True)
    names, modules = process.stdout.decode().splitlines()
    assert re.fullmatch(r"\['(walk|run)'(, '(walk|run)'){3}\]", names)
    assert not {"common", "torchvision"} & set(modules.split())
