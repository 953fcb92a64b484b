"""The pack's model folders, `models/backbones`, `models/featinv`, `models/featinv_concepts`,
`models/featinv_decoders` and `models/featinv_linear_maps`, wherever the host keeps them."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path

import folder_paths

from ..core.backbone_weights import HUB_FILES
from ..core.checkpoints import SUFFIXES
from ..core.errors import FeatInvError
from ..core.feature_files import KEY
from ..core.files import HUB, read_metadata, require_name
from ..worlds import DECODERS as SHIPPED_DECODERS
from ..worlds import World, decoder_folder

BACKBONES, CONTROLS, CONCEPTS = "backbones", "featinv", "featinv_concepts"
DECODERS, LINEAR_MAPS = "featinv_decoders", "featinv_linear_maps"
CONFIG = "config.json"  # in the folder of each decoder
EXTENSIONS = {
    BACKBONES: {".safetensors", *SUFFIXES},
    CONTROLS: {".safetensors"},
    CONCEPTS: {".safetensors"},
    DECODERS: {".json"},
    LINEAR_MAPS: {".safetensors"},
}
EMBEDDED = " (embedded)"  # after the name of what is part of the pack
NO_DECODER = "(no decoder yet: python3 run.py download rae-dinov2-base)"
NOTHING_SAVED = "(nothing saved yet: use Save Features)"


def register() -> None:
    """Adds the folders beside the host's other models; folders named in extra_model_paths.yaml, and what other packs
    look for there, stay."""
    for name in EXTENSIONS:
        folder_paths.add_model_folder_path(name, str(Path(folder_paths.models_dir) / name))
        paths, known = folder_paths.folder_names_and_paths[name]
        folder_paths.folder_names_and_paths[name] = (paths, set(known) | EXTENSIONS[name])


def names(folder: str) -> list[str]:
    """The files of a folder, with their subfolders, as the host's widgets name them."""
    return folder_paths.get_filename_list(folder)


def places(folder: str) -> list[str]:
    """Where the host looks for a folder's files."""
    return folder_paths.get_folder_paths(folder)


def to_write(folder: str, name: str, node: str) -> Path:
    """The .safetensors file to write under a name in a folder. node: who asks, for messages. Raises FeatInvError for a
    name that leads out of the folder."""
    name = name.strip()
    require_name(f"{name}.safetensors")
    place = Path(places(folder)[0]).resolve()
    file = (place / f"{name.removesuffix('.safetensors')}.safetensors").resolve()
    if not file.is_relative_to(place) or file.name == ".safetensors":
        raise FeatInvError(f"{node}: the name {name!r} is empty or leads out of {place}; give a file name")
    return file


def stamp(file: Path) -> str:
    """Changes when a file is written again or another takes its place, even one that keeps its date."""
    status = file.stat()
    return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"


def path(folder: str, name: str) -> Path:
    """The file behind a name. Raises FeatInvError, which says where it should be."""
    full = folder_paths.get_full_path(folder, name)
    if full is None:
        page = f"{HUB}/timm/{Path(name).parent if Path(name).name in HUB_FILES else Path(name).stem}"
        fetch = f" (from {page}, or by python3 run.py download CONFIG)" if folder == BACKBONES else ""
        raise FeatInvError(
            f"{name} is not in {', '.join(places(folder))}. Put the file there{fetch} and press R to refresh the list"
        )
    return Path(full)


def embedded(name: str, known: Collection[str]) -> str | None:
    """The short name in "NAME (embedded)"; None for a name without that ending. Raises FeatInvError for one that the
    pack does not have: a workflow can hold any text, and must not open files elsewhere on the disk by it."""
    if not name.endswith(EMBEDDED):
        return None
    short = name.removesuffix(EMBEDDED)
    if short not in known:
        raise FeatInvError(f"{name} is not part of the pack; it has {', '.join(known) or 'none'}. Choose from the list")
    return short


def located(folder: str, name: str, shipped: Mapping[str, World]) -> Path:
    """The file that a widget names: one of the pack's, shipped with the world that has it, or one in the folder. Raises
    FeatInvError as embedded and path do."""
    short = embedded(name, shipped)
    return path(folder, name) if short is None else shipped[short].file(short)


def modified(folder: str, name: str) -> str:
    """Changes when the file behind a widget's name changes. Missing files are reported when they are opened."""
    try:
        return name if name.endswith(EMBEDDED) else f"{name} {stamp(path(folder, name))}"
    except (FeatInvError, OSError):
        return name


def decoders() -> list[str]:
    """What Load Feature Decoder lists: the embedded ones, and the folders of models/featinv_decoders; NO_DECODER alone
    where there is none."""
    files = [Path(name) for name in names(DECODERS)]
    found = [file.parent.as_posix() for file in files if file.name == CONFIG and file.parent.name]
    return [*(name + EMBEDDED for name in SHIPPED_DECODERS), *found] or [NO_DECODER]


def decoder(name: str) -> Path:
    """The folder behind a name of decoders. Raises FeatInvError, which says where it should be."""
    if (short := embedded(name, SHIPPED_DECODERS)) is not None:
        return decoder_folder(short)
    file = folder_paths.get_full_path(DECODERS, f"{name}/{CONFIG}")
    if file is None:
        asked = "Load Feature Decoder: no decoder is chosen" if name == NO_DECODER else f"{name} is not there"
        raise FeatInvError(
            f"{asked}. Put a folder of diffusers' AutoencoderRAE into {', '.join(places(DECODERS))}, or fetch one by"
            " python3 run.py download rae-dinov2-base; then press R to refresh the list"
        )
    return Path(file).parent


def decoder_modified(name: str) -> str:
    """Changes when a file of a decoder's folder changes. Missing files are reported when they are opened."""
    try:
        folder = decoder(name)
        return " ".join([name, *(f"{file.name} {stamp(file)}" for file in sorted(folder.iterdir()) if file.is_file())])
    except (FeatInvError, OSError):
        return name


def saved_features() -> list[str]:
    """Feature files anywhere below the output and the input folder, as the host annotates names; NOTHING_SAVED alone
    where there is none. Other safetensors files, checkpoints for instance, are left out."""
    names = []
    for kind, root in (
        ("output", folder_paths.get_output_directory()),
        ("input", folder_paths.get_input_directory()),
    ):
        files = [
            Path(folder, name) for folder, _, all_ in os.walk(root) for name in all_ if name.endswith(".safetensors")
        ]
        names += [f"{f.relative_to(root).as_posix()} [{kind}]" for f in sorted(files) if _holds_features(f)]
    return names or [NOTHING_SAVED]


def _holds_features(file: Path) -> bool:
    try:
        return _read_kind(file, stamp(file))
    except OSError:  # gone meanwhile, or a broken link
        return False


@lru_cache(maxsize=4096)
def _read_kind(file: Path, stamp: str) -> bool:
    """Whether a file holds feature maps; its header is read once for each stamp."""
    try:
        return KEY in read_metadata(file)
    except FeatInvError:
        return False


def features_file(name: str) -> Path:
    """The file behind a name of saved_features. Raises FeatInvError if nothing was saved, it is gone, or the name leads
    out of the output and the input folder."""
    if name == NOTHING_SAVED:
        raise FeatInvError(
            "Load Features: no feature file is chosen. Save a feature map with Save Features, press R to refresh the"
            " list, and choose the file"
        )
    try:
        file = Path(os.path.abspath(folder_paths.get_annotated_filepath(name)))
    except ValueError:  # newer hosts refuse a name that leads out
        file = None
    roots = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    if file is None or not any(file.is_relative_to(os.path.abspath(root)) for root in roots):
        raise FeatInvError(
            f"Load Features: {name!r} leads out of the output and the input folder; choose from the list"
        )
    if not file.is_file():
        raise FeatInvError(f"Load Features: {file} does not exist any more; press R to refresh the list")
    return file
