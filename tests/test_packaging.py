"""`pip install .`: what a library's user gets."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11
ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_file_of_the_packages_is_installed():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = subprocess.run(["git", "ls-files", "featinv_nodes", "training"], cwd=ROOT, capture_output=True, text=True)
    others = [Path(name) for name in files.stdout.split() if not name.endswith(".py")]
    assert [str(f) for f in others if not any(f.match(pattern) for pattern in patterns)] == []


def test_every_package_that_the_code_imports_is_declared():
    """By the name that it is installed under. Optional ones are named where they are imported."""
    declared = {
        line.split(">=")[0].split("==")[0].strip().lower().replace("-", "_")
        for file in ("requirements.txt", "training/requirements.txt")
        for line in (ROOT / file).read_text().splitlines()
        if line and not line.startswith("#")
    }
    installed_as = {
        "sklearn": "scikit_learn",
        "PIL": "pillow",
        "yaml": "pyyaml",
        "pydantic_core": "pydantic",
        "pyarrow": "datasets",
    }
    own = {"featinv_nodes", "training", "run"}
    host = {"aiohttp", "comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}
    optional = {"bitsandbytes", "fsspec", "imagecorruptions", "triton"}  # named where they are missing
    names = {name for file in ("featinv_nodes", "training") for name in imported(ROOT / file)}
    names -= own | host | optional | set(sys.stdlib_module_names)
    assert {installed_as.get(name, name) for name in names} - declared == set()


def imported(folder):
    """The top-level modules that the folder's files import."""
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]
