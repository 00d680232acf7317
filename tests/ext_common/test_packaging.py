"""What `pip wheel .` makes: the three packages, and nothing beside them."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("ext_common", "fairseq_ext", "diffusion_ext")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, repo_root):
    """The wheel of the working tree; built in a copy, as a build leaves its own folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "results")
    shutil.copytree(repo_root, folder / "source", ignore=skipped, symlinks=True)
    command = "-m pip wheel --quiet --no-deps --no-build-isolation --no-index -w"
    subprocess.run(
        [sys.executable, *command.split(), folder, folder / "source"],
        check=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_what_says_what_they_are(wheel, repo_root):
    config = configparser.ConfigParser()
    config.read(repo_root / "setup.cfg")
    version = config["metadata"]["version"]
    info = f"fairseq_ext-{version}.dist-info"
    assert wheel.name == f"fairseq_ext-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        str(path.relative_to(repo_root))
        for package in PACKAGES
        for path in (repo_root / package).rglob("*.py")
    }
    assert {name for name in names if not name.startswith(info)} == wanted
    licences = f"{info}/licenses"
    assert {f"{licences}/LICENSE", f"{licences}/NOTICE", f"{info}/METADATA"} <= names
    changes = (repo_root / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = [part.split()[0] for part in changes.split("\n## ")[1:]]
    assert next(name for name in headings if name != "Unreleased") == version


@pytest.mark.slow
@pytest.mark.parametrize("plugin", ["fairseq_ext", "diffusion_ext"])
def test_an_installed_plugin_says_where_it_is(wheel, tmp_path, plugin):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    said = subprocess.run(
        [sys.executable, "-m", plugin],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"{tmp_path / 'installed' / plugin}\n"
    assert Path(said.stdout.strip(), "__init__.py").is_file()
