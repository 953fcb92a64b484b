"""The node that combines feature maps."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..core.errors import FeatInvError
from ..core.feature_map import FeatureMap, concatenate
from .types import Backbone, Features, Menu, schema

MIXES = ("interpolate", "sweep", "compose")


class FeatureMix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatInv_FeatureMix",
            display_name="Feature Mix",
            category=Menu.FEATURES,
            aliases=("interpolate", "compose", "mix images", "blend two images", "merge pictures", "morph"),
            description=(
                "Mixes feature maps of one backbone and layer: a weighted mean of up to four, a sweep from a to b, or"
                " up to three maps inside masks with a around them."
            ),
            inputs=[
                Features.Input("features_a", tooltip="The first feature map."),
                Features.Input("features_b", tooltip="The second feature map, from the same backbone and layer."),
                io.Combo.Input(
                    "mode",
                    options=list(MIXES),
                    default="interpolate",
                    tooltip=(
                        "interpolate: mean by the weights. sweep: a batch from a to b in equal steps. compose: b inside"
                        " the mask, c and d inside theirs, a outside."
                    ),
                ),
                io.Float.Input(
                    "weight_a",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Weight of a (interpolate). Weights are divided by their sum.",
                ),
                io.Float.Input(
                    "weight_b", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="Weight of b (interpolate)."
                ),
                io.Int.Input(
                    "steps",
                    default=5,
                    min=2,
                    max=64,
                    tooltip=(
                        "Maps in the sweep, including a and b. Set the batch size of Empty Latent Image, or the"
                        " amount of Repeat Latent Batch, to the same number (times the number of maps if a or b is a"
                        " batch)."
                    ),
                ),
                io.Boolean.Input(
                    "soft_edge",
                    default=False,
                    tooltip="compose: mixes the maps in cells that the mask covers in part, instead of choosing one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "compose: where b goes. If the backbone is connected, the mask is cropped like the images,"
                        " else stretched over the map."
                    ),
                ),
                Features.Input(
                    "features_c",
                    optional=True,
                    tooltip="A third feature map: interpolate by weight_c, compose inside mask_c.",
                ),
                io.Float.Input(
                    "weight_c",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Weight of c, if connected.",
                ),
                Features.Input(
                    "features_d",
                    optional=True,
                    tooltip="A fourth feature map: interpolate by weight_d, compose inside mask_d.",
                ),
                io.Float.Input(
                    "weight_d",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Weight of d, if connected.",
                ),
                Backbone.Input(
                    "backbone",
                    optional=True,
                    tooltip=(
                        "compose: crops the masks as Extract Features crops an image, for masks that were painted on"
                        " it. Without a backbone they are stretched over the map."
                    ),
                ),
                io.Mask.Input(
                    "mask_c", optional=True, tooltip="compose: where c goes, if connected. It lies on top of b."
                ),
                io.Mask.Input(
                    "mask_d", optional=True, tooltip="compose: where d goes, if connected. It lies on top of b and c."
                ),
            ],
            outputs=[
                Features.Output(
                    "features", display_name="features", tooltip="The mixed feature map, or the sweep as a batch."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        features_a,
        features_b,
        mode,
        weight_a,
        weight_b,
        steps,
        soft_edge,
        mask=None,
        features_c=None,
        weight_c=0.5,
        features_d=None,
        weight_d=0.5,
        backbone=None,
        mask_c=None,
        mask_d=None,
    ) -> io.NodeOutput:
        from ..core.mixing import interpolate

        if mode not in MIXES:  # the oldest hosts let any text through
            raise FeatInvError(f"Feature Mix: mode {mode!r}; expected one of {MIXES}")
        if mode == "interpolate":
            given = [(features_a, weight_a), (features_b, weight_b), (features_c, weight_c), (features_d, weight_d)]
            maps, weights = zip(*[(m, w) for m, w in given if m is not None])
            return io.NodeOutput(interpolate(same_batch(maps), weights))
        if mode == "sweep":
            a, b = same_batch([features_a, features_b])
            return io.NodeOutput(
                concatenate([interpolate([a, b], [1 - w, w]) for w in torch.linspace(0, 1, steps).tolist()])
            )
        parts = {"": (features_b, mask), "_c": (features_c, mask_c), "_d": (features_d, mask_d)}
        return io.NodeOutput(composed(features_a, parts, soft_edge, backbone))


def composed(outside: FeatureMap, parts: dict[str, tuple], soft_edge: bool, backbone) -> FeatureMap:
    """The maps of `parts`, each inside its mask. parts: ending of the mask's name -> (feature map, mask); (None, None)
    where nothing is connected. Raises FeatInvError for one without the other."""
    from ..core.mixing import compose_regions, require_mask

    for name, (features, mask) in parts.items():
        if name and features is None and mask is not None:
            raise FeatInvError(f"Feature Mix: mask{name} is connected, features{name} is not; connect both or neither")
        if features is not None and mask is None:
            raise FeatInvError(
                f"Feature Mix: mode 'compose' needs a mask for features{name or '_b'}; connect mask{name}, for"
                " instance from Load Image's mask editor"
            )
    given = [(features, mask) for features, mask in parts.values() if features is not None]
    outside, *maps = same_batch([outside, *(features for features, _ in given)])
    masks = []
    for _, mask in given:
        require_mask(mask)
        if backbone is not None:
            mask = backbone.backbone.preprocess(mask[:, None], "crop")[:, 0]
        masks.append(mask.to(outside.values.device))
    return compose_regions(outside, list(zip(maps, masks)), soft_edge)


def same_batch(maps: list[FeatureMap] | tuple[FeatureMap, ...]) -> list[FeatureMap]:
    """Single maps repeated to the size of the batches among them. Raises FeatInvError for batches of two sizes."""
    sizes = {len(m) for m in maps} - {1}
    if len(sizes) > 1:
        raise FeatInvError(f"Feature Mix: batches of {sorted(sizes)} feature maps; give equal numbers, or single maps")
    size = sizes.pop() if sizes else 1
    return [m.repeat(size) if len(m) == 1 else m for m in maps]


NODES = [FeatureMix]
