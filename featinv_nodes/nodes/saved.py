"""Nodes that keep feature maps as files."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..core.errors import FeatInvError
from ..core.files import require_name
from ..host import folders
from .features import said
from .types import Features, Menu, schema


class SaveFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_SaveFeatures",
            display_name="Save Features",
            category=Menu.FEATURES,
            aliases=("export features",),
            description="Writes feature maps with their source to a .safetensors file in the output folder.",
            inputs=[
                Features.Input("features", tooltip="What to save."),
                io.String.Input(
                    "filename_prefix",
                    default="features/features",
                    tooltip=(
                        "Folder and beginning of the file's name, below the output folder; a number is added. Load"
                        " Features lists the files of every folder."
                    ),
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, features, filename_prefix) -> io.NodeOutput:
        from ..core.feature_files import save_features

        require_name(f"{filename_prefix}_00001.safetensors")
        folder, name, _, _, _ = folder_paths.get_save_image_path(filename_prefix, folder_paths.get_output_directory())
        file = next(file for n in count(1) if not (file := Path(folder) / f"{name}_{n:05}.safetensors").exists())
        save_features(file, features)
        name = file.relative_to(folder_paths.get_output_directory()).as_posix()
        return io.NodeOutput(ui=ui.PreviewText(f"saved {name} [output]\nPress R to see it in Load Features."))


class LoadFeatures(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_LoadFeatures",
            display_name="Load Features",
            category=Menu.FEATURES,
            aliases=("import features",),
            says=True,
            description="Reads feature maps that Save Features wrote.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.saved_features(),
                    tooltip="A file that Save Features wrote, in any folder of output or input. Press R after saving.",
                )
            ],
            outputs=[
                Features.Output("features", display_name="features", tooltip="The feature maps, with their source.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        try:
            return folders.stamp(folders.features_file(file))
        except FeatInvError:  # said by execute
            return ""

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from ..core.feature_files import load_features
        from ..host.models import management

        features = load_features(folders.features_file(file)).to(management.intermediate_device())
        return io.NodeOutput(features, ui=ui.PreviewText(said(features)))


NODES = [SaveFeatures, LoadFeatures]
