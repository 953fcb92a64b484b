"""The pack's model folders, `models/backbones`, `models/featinv` and `models/featinv_concepts`, wherever the host keeps
them."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..core.backbone_weights import HUB_FILES
from ..core.checkpoints import SUFFIXES
from ..core.feature_map import FeatInvError
from ..core.files import HUB

BACKBONES, CONTROLS, CONCEPTS = "backbones", "featinv", "featinv_concepts"
EXTENSIONS = {
    BACKBONES: {".safetensors", *SUFFIXES},
    CONTROLS: {".safetensors"},
    CONCEPTS: {".safetensors"},
}


def register() -> None:
    """Adds the folders beside the host's other models; folders named in extra_model_paths.yaml, and what other packs
    look for there, stay."""
    for name in (BACKBONES, CONTROLS, CONCEPTS):
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | EXTENSIONS[name])


def names(folder: str) -> list[str]:
    """The files of a folder, with their subfolders, as the host's widgets name them."""
    return folder_paths.get_filename_list(folder)


def stamp(file: Path) -> str:
    """Changes when a file is written again or another takes its place, even one that keeps its date."""
    status = file.stat()
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def path(folder: str, name: str) -> Path:
    """The file behind a name. Raises FeatInvError that says where it was looked for."""
    full = folder_paths.get_full_path(folder, name)
    if full is None:
        places = ", ".join(folder_paths.get_folder_paths(folder))
        page = f"{HUB}/timm/{Path(name).parent if Path(name).name in HUB_FILES else Path(name).stem}"
        fetch = f" (from {page}, or by python3 run.py download CONFIG)" if folder == BACKBONES else ""
        raise FeatInvError(f"{name} is not in {places}. Put the file there{fetch} and press R to refresh the list")
    return Path(full)
