"""The tutorials' commands, run as they stand on the page, on small images."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tests.project import REPOSITORY, Project

PAGES = REPOSITORY / "docs" / "tutorials"
BLOCK = re.compile(r'^```(sh|python|yaml title="(.+?)")\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def script(name):
    """A page's commands, files and Python in their order, as one script of bash."""
    parts = ["set -euo pipefail"]
    for kind, file, text in BLOCK.findall((PAGES / name).read_text()):
        if file:
            parts.append(f"cat > {file} <<'EOF'\n{text}EOF")
        else:
            parts.append(f"python - <<'EOF'\n{text}EOF" if kind == "python" else text)
    assert len(parts) > 1, f"{name} has no commands"
    return "\n".join(parts)


def follow(name, folder, images="/data/flowers"):
    text = script(name).replace("/data/flowers", str(images))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as when activated
    known = {"cwd": folder, "env": {**os.environ, "PATH": path}}
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, **known)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Digits as two kinds of flowers."""
    folder = tmp_path_factory.mktemp("data") / "flowers"
    digits = load_digits()
    for flower, digit in (("rose", 3), ("tulip", 6)):
        (folder / flower).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == digit][:110]):
            image = Image.fromarray((pixels * 15.9).astype(np.uint8))
            image.save(folder / flower / f"{number:04}.png")
    return folder


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """The first tutorial, done: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    return folder, follow("own_images.md", folder, images)


def test_own_images(made):
    folder, printed = made
    assert (folder / "flowers/config.yaml").exists()
    assert "220 images" in printed
    assert "| LatentBE+TDiv–SDiv |" in printed


def test_export_and_use(made, images):
    folder, _ = made
    printed = follow("export_and_use.md", folder / "flowers", images)
    answers = pd.read_csv(folder / "flowers/answers.csv")
    assert len(answers) == 220
    assert set(answers["class"]) <= {"rose", "tulip"}
    assert "(2, 2) (2, 1, 2)" in printed
    assert (folder / "flowers/flowers_card/README.md").exists()


def test_on_a_cluster(tmp_path):
    project = Project.new(tmp_path)
    project.configure(yaml.safe_load((REPOSITORY / "config.yaml").read_text()))
    printed = follow("cluster.md", project.folder)
    assert "rule claims" in printed
    assert "rule teacher" in printed
    assert re.search(r"mem_mb=\d+", printed)
    assert not (tmp_path / "results").exists()
