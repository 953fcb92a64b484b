#!/usr/bin/env python3
"""Sets up and starts the project on a fresh computer. Needs Python 3.10 or newer and nothing else.

    python3 run.py demo [--image FILE ...]    set up, then invert, mix and compose photographs; writes to out/demo
    python3 run.py test [PYTEST ARGUMENTS]    set up, then run every test in two processes (-n N for more)
    python3 run.py comfy [HOST ARGUMENTS]     start ComfyUI (COMFYUI_PATH, or ~/comfy/ComfyUI) with the pack linked in
    python3 run.py download CONFIG [--to DIR] set up, then fetch the backbone and base model of a training configuration
                                              into DIR (default: the models folder of that ComfyUI, else models/); or
                                              a feature decoder with its backbone, such as rae-dinov2-base

All commands but comfy create .venv beside this file and reuse it the next time; with --no-venv they use the running
Python. comfy runs the checkout with its own environment and installs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = {
    "demo": ["requirements.txt"],
    "test": ["requirements.txt", "training/requirements.txt"],
    "download": ["requirements.txt"],
}


def step(what: str, command: list[str]) -> None:
    """Runs one step of the set-up; stops with a message that names it if it fails."""
    print(f"[set-up] {what} ...", flush=True)
    if subprocess.call(command, cwd=ROOT):
        sys.exit(f"[set-up] failed: {what}\n         command: {' '.join(map(str, command))}")


def environment(files: list[str], use_running: bool) -> str:
    """The Python to run with, with the requirements installed; does nothing where they already are."""
    if use_running:
        return sys.executable
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        step("make the virtual environment .venv", [sys.executable, "-m", "venv", str(folder)])
    expected = hashlib.sha256(b"".join((ROOT / f).read_bytes() for f in files)).hexdigest()
    stamp = folder / f"installed-{len(files)}"
    if not stamp.exists() or stamp.read_text() != expected:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        # torch and torchvision together, so that a matching pair is chosen before anything else asks for one of them
        step(
            "install torch and torchvision (several GB on Linux with their GPU libraries)",
            [*pip, "torch", "torchvision"],
        )
        step("install the other requirements", [*pip, "--quiet", *(part for f in files for part in ("-r", f))])
        stamp.write_text(expected)
    return str(python)


def comfy_checkouts() -> list[Path]:
    """Where ComfyUI is looked for: COMFYUI_PATH, several joined by the platform's separator, or comfy-cli's default
    place."""
    named = [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    return named or [Path.home() / "comfy" / "ComfyUI"]


def models_folder() -> Path:
    """Where files for the models go: to the first ComfyUI that is there, else beside this file."""
    return next((root / "models" for root in comfy_checkouts() if (root / "main.py").is_file()), ROOT / "models")


def comfy_python(root: Path) -> str:
    """The Python that runs a checkout: COMFYUI_PYTHON, or its own .venv or venv, or the running one."""
    inside = "Scripts/python.exe" if os.name == "nt" else "bin/python"
    own = [root / name / inside for name in (".venv", "venv")]
    return os.environ.get("COMFYUI_PYTHON") or next((str(p) for p in own if p.exists()), sys.executable)


def start_comfy(arguments: list[str]) -> int:
    """Links the pack and a first workflow into the checkout and starts it."""
    root = comfy_checkouts()[0]
    if not (root / "main.py").is_file():
        sys.exit(f"no ComfyUI at {root}: clone it there, or name your checkout in COMFYUI_PATH")
    link = root / "custom_nodes" / "ComfyUI-FeatInv"
    if not link.exists() and ROOT.parent != root / "custom_nodes":
        try:
            link.symlink_to(ROOT, target_is_directory=True)
        except OSError as error:
            sys.exit(f"could not link {link} to {ROOT} ({error}); copy the folder there instead")
        print(f"linked {link}")
    saved = root / "user" / "default" / "workflows"
    if not (saved / "featinv_reconstruct.json").exists():
        saved.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "workflows" / "photo_reconstruct.json", saved / "featinv_reconstruct.json")
    print("open the workflow featinv_reconstruct, and press Run", flush=True)
    return subprocess.call([comfy_python(root), "main.py", *arguments], cwd=root)


def main() -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever types the command may have an older one
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*REQUIREMENTS, "comfy"])
    parser.add_argument("--no-venv", action="store_true", help="use the running Python and what is installed in it")
    args, rest = parser.parse_known_args()
    if args.command == "comfy":
        return start_comfy(rest)
    python = environment(REQUIREMENTS[args.command], args.no_venv)
    program = {
        "demo": [str(ROOT / "training" / "demo.py")],
        "test": ["-m", "pytest", "-n", "2"],  # a later -n wins
        "download": [str(ROOT / "training" / "download.py"), "--to", str(models_folder())],  # a later --to wins
    }[args.command]
    if args.command == "test":
        os.chdir(ROOT)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores already
    return subprocess.call([python, *program, *rest])


if __name__ == "__main__":
    sys.exit(main())
