"""The node that finds concepts."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..core.concepts import METHODS
from ..core.errors import FeatInvError
from ..core.images import find_images
from ..host import folders
from .types import Backbone, ConceptSet, Menu, channels_first, schema


class DiscoverConcepts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_DiscoverConcepts",
            display_name="Discover Concepts",
            category=Menu.CONCEPTS,
            aliases=("MCD", "PCA", "NMF", "sparse autoencoder", "clustering"),
            description=(
                "Finds concepts in the features of many images: groups of directions in the backbone's feature"
                " space, for Concept Attenuate."
            ),
            inputs=[
                Backbone.Input("backbone", tooltip="The vision model, from Load Backbone or FeatInv Loader."),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip=(
                        "A folder of images below ComfyUI's input folder, or an absolute path. It holds one class,"
                        " or a folder per class. Empty if images are connected."
                    ),
                ),
                io.String.Input(
                    "layer",
                    default="last",
                    tooltip="The layer to find concepts in, as in Extract Features. Only 'last' gives relevance.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="mcd",
                    tooltip=(
                        "mcd finds subspaces (multi-dimensional concept discovery). mcd-elastic-net does the same"
                        " with the published clustering, which takes minutes for thousands of vectors. pca, nmf and"
                        " kmeans find single directions. sae finds the dictionary of a sparse autoencoder."
                    ),
                ),
                io.Int.Input(
                    "concepts",
                    default=8,
                    min=0,
                    max=4096,
                    tooltip=(
                        "How many clusters, directions or atoms to look for. 0 (mcd, layer 'last'): as many clusters"
                        " as the concepts need to explain half of the class weights."
                    ),
                ),
                io.Int.Input(
                    "vectors",
                    default=20_000,
                    min=1,
                    max=1_000_000,
                    tooltip=(
                        "How many feature vectors to use at most, taken evenly from the images. Must be at least"
                        " the layer's number of channels. 20,000 vectors of 1,024 channels take about 1 GB."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="The same images and seed give the same concepts.",
                ),
                io.Combo.Input(
                    "fit",
                    options=["crop", "stretch"],
                    default="crop",
                    tooltip="How an image is brought to the model's input size, as in Extract Features.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip=(
                        "Saves the concepts under this name in models/featinv_concepts, for Load Concepts, and"
                        " replaces a file of that name. Empty: not saved."
                    ),
                ),
                io.Image.Input("images", optional=True, tooltip="A batch of images instead of a folder."),
            ],
            outputs=[
                ConceptSet.Output(
                    "found", display_name="concepts", tooltip="The concepts, for Concept Attenuate and Concept Map."
                ),
                io.String.Output(
                    "names",
                    display_name="names",
                    tooltip=(
                        "Number, name, dimension, share of the feature norm, relevance and classes of each concept,"
                        " and what was rejected. The node shows it."
                    ),
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = "", **others) -> str:
        """Changes when pictures below the folder are added, replaced or taken away. What comes through a link is None
        here."""
        try:
            pictures = find_images(located(folder)) if folder and folder.strip() else []
        except FeatInvError:  # said by execute
            return ""
        return sha256(str([(str(file), folders.stamp(file)) for file in pictures]).encode()).hexdigest()

    @classmethod
    def execute(cls, backbone, folder, layer, method, concepts, vectors, seed, fit, name, images=None) -> io.NodeOutput:
        from ..core.concepts import save_concepts
        from ..core.concepts.collect import Folder, Pictures
        from ..core.concepts.statistics import listing, remarks, with_statistics
        from ..host.discovery import discover_concepts

        if (images is None) == (not folder.strip()):
            raise FeatInvError("Discover Concepts: connect images or name a folder of images, one of the two")
        file = folders.to_write(folders.CONCEPTS, name, "Discover Concepts") if name.strip() else None
        if images is None:
            pictures = Folder(located(folder), backbone.backbone, fit, vectors, seed)
        else:
            pictures = Pictures(channels_first(images), backbone.backbone, fit)
        result, worth, collected = discover_concepts(backbone, pictures, layer.strip(), method, concepts, vectors, seed)
        if file:
            save_concepts(file, with_statistics(result, worth, read=collected.read, classes=collected.classes))
        lines = [
            pictures.skipped(),
            f"read {collected.describe()}",
            listing(result, worth),
            *remarks(result, worth),
            f"saved as {name.strip().removesuffix('.safetensors')}.safetensors" if file else "",
        ]
        text = "\n".join(filter(None, lines))
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))


def located(folder: str) -> Path:
    """The folder that a text names, below the host's input folder unless it is absolute."""
    unquoted = folder.strip().strip("\"'")  # as some systems copy paths
    return Path(folder_paths.get_input_directory(), Path(unquoted).expanduser())


NODES = [DiscoverConcepts]
