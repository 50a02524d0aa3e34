"""The wheel and the source distribution: what is in them, and that a user can install and use them."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from common.launch import ROOT
from common.tiny import save
from helpers.examples import sums

import tbrm_trl

NEITHER = shutil.ignore_patterns(".*", "outputs", "site", "build", "dist", "*.egg-info", "__pycache__")


@pytest.mark.launch
def test_built_installed_and_used(tmp_path):
    """Built from a copy, installed where no other tbrm-trl is found, and used: a report of a run of two updates."""
    copy, built = shutil.copytree(ROOT, tmp_path / "copy", ignore=NEITHER), tmp_path / "dist"
    python = [sys.executable, "-m"]
    subprocess.run([*python, "build", "--no-isolation", "--outdir", built, copy], check=True, capture_output=True)
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    package = {
        str(file.relative_to(ROOT / "src"))
        for file in (ROOT / "src/tbrm_trl").rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert {"tbrm_trl/py.typed", "tbrm_trl/report/page.js", "tbrm_trl/report/uplot/uPlot.iife.min.js"} <= package
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == package
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", *(f"src/{name}" for name in package)} <= inside
    assert not [name for name in inside if name.startswith(("tests", "docs", "benchmarks", "examples"))]

    venv.create(tmp_path / "venv", symlinks=True)
    binaries = tmp_path / "venv/bin"
    install = ["pip", "--python", binaries / "python", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([*python, *install], check=True)
    # Everything else comes from this environment: a folder in a .pth file is searched, but .pth files in that folder,
    # such as that of an editable installation, are not read.
    (installed,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (installed / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def run(*words: str | Path) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run(binaries / "python", "-c", "import tbrm_trl; print(tbrm_trl.__file__)")
    assert Path(found.strip()).is_relative_to(installed)
    tbrm = binaries / "tbrm"
    assert run(tbrm, "--version").strip() == tbrm_trl.__version__
    options = dict(
        model_name_or_path=save(tmp_path / "model"), dataset_name=sums(tmp_path / "sums.json"), output_dir="out",
        max_steps=2, per_device_train_batch_size=2, max_completion_length=4, logging_steps=1, save_rollouts="true",
        use_cpu="true", bf16="false", report_to="none",
    )  # fmt: skip
    run(tbrm, "train", *(word for name, value in options.items() for word in (f"--{name}", str(value))))
    run(tbrm, "report", "out")
    assert "uPlot" in (tmp_path / "out/report.html").read_text()
