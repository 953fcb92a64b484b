"""Feature decoders from folders: released ones in diffusers' class AutoencoderRAE, and those of the embedded worlds.

An AutoencoderRAE has an encoder, a vision transformer of transformers, whose last normalisation has no weights, and a
decoder. Of the folder only the decoder is built; the backbone, timm's form of that encoder, gives the maps. Its last
normalisation is taken back, and the statistics by which the encoder normalises and the decoder undoes it cancel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from .core.errors import FeatInvError
from .worlds import DECODERS, decoder_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .core.backbones import Backbone
    from .core.feature_decoder import FeatureDecoder
    from .core.feature_map import FeatureSource
    from .core.metadata import DecoderFolder
    from .core.model_folder import WeightsFolder

DIFFUSERS = (0, 39)  # the oldest with the class
#: encoder_type, encoder_hidden_size, encoder_patch_size -> the backbone
BACKBONES = {
    ("dinov2", 384, 14): "vit_small_patch14_reg4_dinov2.lvd142m",
    ("dinov2", 768, 14): "vit_base_patch14_reg4_dinov2.lvd142m",
    ("dinov2", 1024, 14): "vit_large_patch14_reg4_dinov2.lvd142m",
    ("siglip2", 768, 16): "vit_base_patch16_siglip_256.v2_webli",
    ("mae", 768, 16): "vit_base_patch16_224.mae",
}
#: parts of the backbone that make a map; its head makes none
TRUNK = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "blocks.")
#: beside the decoder's tensors: of the encoder, and statistics
OTHERS = ("encoder.", "encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
DECODER, POSITIONS = "decoder.", "decoder_pos_embed"
NEAR = 1e-3  # half precision rounds by half of this


@dataclass(frozen=True)
class DecoderFiles:
    """A folder whose configuration was read and checked, and whose weights are listed."""

    folder: Path
    config: DecoderFolder
    weights: WeightsFolder

    @property
    def bytes(self) -> int:
        """Memory that the decoder's weights take."""
        return 4 * sum(prod(shape) for name, shape in self.weights.shapes.items() if name.startswith(DECODER))

    @property
    def backbone(self) -> str:
        """The full name of the backbone whose maps it decodes; "" where none is known."""
        about = self.config
        if about.featinv_source:
            return about.featinv_source.backbone
        return BACKBONES.get((about.encoder_type, about.encoder_hidden_size, about.encoder_patch_size), "")


def find_decoder(folder: str | Path) -> DecoderFiles:
    """The files of a decoder, a folder or the name of an embedded one. Raises FeatInvError for a folder that is not
    there, is not complete, or holds a model of another class."""
    from .core.metadata import DecoderFolder, ModelClass, parse
    from .core.model_folder import WeightsFolder

    path = decoder_folder(str(folder))
    file = path / "config.json"
    if not file.is_file():
        raise FeatInvError(f"{path} is not complete: it has no config.json; download or copy the folder again")
    text, kind = file.read_text(encoding="utf-8", errors="replace"), "decoder's configuration"
    if (name := parse(ModelClass, text, file, kind).class_name) != "AutoencoderRAE":
        raise FeatInvError(
            f"{path} holds {f'a model of the class {name}' if name else 'a model that names no class'}; expected an"
            " AutoencoderRAE of diffusers. Choose a feature decoder, such as python3 run.py download rae-dinov2-base"
            " fetches"
        )
    return DecoderFiles(path, parse(DecoderFolder, text, file, kind), WeightsFolder(path))


def open_feature_decoder(
    folder: str | Path | DecoderFiles, backbone: Backbone | None = None, other_weights: bool = False
) -> FeatureDecoder:
    """A decoder of feature maps, in float32 on the CPU.

    folder: an AutoencoderRAE folder of diffusers, the name of an embedded decoder, or what find_decoder gives.
    backbone: timm's form of the encoder that it was trained with; an embedded decoder does not need it. other_weights:
    go on with a backbone of other weights, and with maps of any weights.

    Raises FeatInvError as find_decoder does, without a diffusers that has the class, for tensors that are missing,
    unexpected or misshapen, and for a backbone that is not the decoder's.
    """
    from .core.feature_decoder import FeatureDecoder

    files = folder if isinstance(folder, DecoderFiles) else find_decoder(folder)
    source = _source(files, backbone, other_weights)
    decoder = _decoder(files)
    mean, std = _colours(files)
    norm = None if files.config.featinv_source or backbone is None else _last_norm(backbone)
    return FeatureDecoder(decoder, source, mean, std, norm).eval()


def decoder_of(
    source: FeatureSource, backbone: Backbone, name: str | None = None, other_weights: bool = False
) -> FeatureDecoder | None:
    """The named feature decoder (a folder, or an embedded one), or the embedded one of maps of this source; None where
    there is none. backbone: that makes the maps. Raises FeatInvError for a named one of other maps."""
    if name:
        decoder = open_feature_decoder(name, backbone, other_weights)
        decoder.source.require(source, f"the feature decoder {name}", "the inversion model")
        return decoder
    for files in map(find_decoder, DECODERS):  # their sources, before any weights
        if _source(files, None, other_weights).fits(source):
            return open_feature_decoder(files, other_weights=other_weights)
    return None


def _last_norm(backbone: Backbone) -> tuple[Tensor, Tensor]:
    last = getattr(backbone.model, "norm", None)
    weight, bias = getattr(last, "weight", None), getattr(last, "bias", None)
    if weight is None or bias is None:
        raise FeatInvError(
            f"the backbone {backbone.name} does not normalise its last map with weights of its own, as the published"
            " one does; open the published weights"
        )
    return weight, bias


def _decoder(files: DecoderFiles) -> nn.Module:
    """diffusers' RAEDecoder with the folder's weights."""
    import torch

    from .core.files import as_float, misfits

    about, shapes = files.config, files.weights.shapes
    settings = {
        "hidden_size": about.encoder_hidden_size,
        "decoder_hidden_size": about.decoder_hidden_size,
        "decoder_num_attention_heads": about.decoder_num_attention_heads,
        "decoder_intermediate_size": about.decoder_intermediate_size,
        "num_patches": about.side**2,
        "patch_size": about.patch_size,
        "image_size": about.patch_size * about.side,
    }
    kind = _decoder_class()
    with torch.device("meta"):  # no memory and no random numbers, whatever sizes the configuration states
        decoder = kind(decoder_num_hidden_layers=about.decoder_num_hidden_layers, **settings)
    expected = {DECODER + name: value for name, value in decoder.state_dict().items()}
    found = {
        name: torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if not name.startswith(OTHERS) and name != DECODER + POSITIONS
    }
    if differing := misfits(expected, found):
        raise FeatInvError(
            f"{files.folder}: the tensors of the decoder do not fit its configuration: {differing}. Download or copy"
            " the folder again"
        )
    tensors = {name: as_float(value, name, files.folder) for name, value in files.weights.read(DECODER).items()}
    state = {name.removeprefix(DECODER): tensors[name] for name in expected}
    decoder.load_state_dict(state, strict=True, assign=True)
    # computed from the sizes, which needs no layers
    decoder.decoder_pos_embed = kind(decoder_num_hidden_layers=0, **settings).decoder_pos_embed
    return decoder


def _decoder_class() -> type[nn.Module]:
    oldest = ".".join(map(str, DIFFUSERS))
    advice = f'run `pip install -U "diffusers>={oldest}"` with the Python that runs this, and start again'
    if find_spec("diffusers") is None:
        raise FeatInvError(f"feature decoders need the package diffusers {oldest} or newer, which is missing: {advice}")
    try:
        from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
    except ImportError as error:
        try:
            there = version("diffusers")
        except PackageNotFoundError:
            there = "of an unknown version"
        raise FeatInvError(
            f"diffusers {there} is installed, but feature decoders need {oldest} or newer ({error}): {advice}"
        ) from error
    return RAEDecoder


def _colours(files: DecoderFiles) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the colour channels: the file's tensors, else the configuration's, else ImageNet's."""
    import torch

    about = files.config
    stated = (about.encoder_norm_mean or (0.485, 0.456, 0.406), about.encoder_norm_std or (0.229, 0.224, 0.225))
    stored = files.weights.read("encoder_mean") | files.weights.read("encoder_std")
    names = ("encoder_mean", "encoder_std")
    mean, std = (stored.get(name, torch.tensor(values)).flatten() for name, values in zip(names, stated))
    if len(mean) != 3 or len(std) != 3:
        raise FeatInvError(f"{files.folder}: encoder_mean and encoder_std have to hold a number for each of 3 colours")
    return mean, std


def _source(files: DecoderFiles, backbone: Backbone | None, other_weights: bool) -> FeatureSource:
    """Of the maps that the decoder reads, once it is sure that the backbone makes such maps."""
    about = files.config
    if about.featinv_source:
        source = about.featinv_source.made()
        if backbone is not None:
            _require_name(files, backbone)
            mine = backbone.source(source.layer, source.pooled)
            mine = replace(mine, weights="") if other_weights else mine
            mine.require(source, "the backbone", "the decoder")
        return replace(source, weights="") if other_weights else source
    if not files.backbone:
        raise FeatInvError(
            f"{files.folder}: no timm backbone is known for its encoder {about.encoder_type} of"
            f" {about.encoder_hidden_size} channels and patches of {about.encoder_patch_size} pixels; known:"
            f" {', '.join(BACKBONES.values())}"
        )
    if backbone is None:
        raise FeatInvError(
            f"{files.folder} decodes maps of {files.backbone} and needs that backbone, to undo its last"
            f" normalisation; open it at {about.encoder_input_size} pixels and give it too"
        )
    _require_name(files, backbone)
    _require_sizes(files, backbone)
    _require_weights(files, backbone, other_weights)
    source = backbone.source()
    return replace(source, weights="") if other_weights else source


def _require_name(files: DecoderFiles, backbone: Backbone) -> None:
    (mine, tag), (theirs, expected) = (name.partition(".")[::2] for name in (backbone.name, files.backbone))
    # where the folder has the encoder, its weights say more than a tag
    known = any(name.startswith("encoder.") for name in files.weights.shapes)
    if mine != theirs or (tag and tag != expected and not known):
        raise FeatInvError(
            f"the backbone is {backbone.name}, the decoder in {files.folder} was trained with {files.backbone}. Open"
            " that one, or the decoder of yours"
        )


def _require_sizes(files: DecoderFiles, backbone: Backbone) -> None:
    about, source = files.config, backbone.source()
    side = about.encoder_input_size
    if source.input_size != (side, side) or source.grid != (about.side, about.side):
        raise FeatInvError(
            f"the backbone {backbone.name} reads {source.input_size[0]} x {source.input_size[1]} pixels, the decoder in"
            f" {files.folder} was trained with {side} x {side}. Open the backbone with input_size {side}"
        )
    means, deviations = (stats.tolist() for stats in _colours(files))
    if any(abs(a - b) > NEAR for a, b in zip((*source.mean, *source.std), (*means, *deviations))):
        raise FeatInvError(
            f"the backbone {backbone.name} normalises colours by mean {source.mean} and deviation {source.std}, the"
            f" encoder of {files.folder} by {[round(x, 4) for x in means]} and {[round(x, 4) for x in deviations]}."
            " Open the backbone by its full timm name"
        )


def _require_weights(files: DecoderFiles, backbone: Backbone, other_weights: bool) -> None:
    """Raises FeatInvError where the folder has the encoder's weights and the backbone's are others."""
    import torch

    from .core.backbone_weights import at_grid
    from .core.files import misfits
    from .core.transformers_weights import prefix_of, to_timm

    stored = files.weights.read("encoder.")
    if not stored:
        return
    state = at_grid(backbone.model, to_timm(stored, stored.__getitem__, prefix_of(stored) or "encoder."))
    mine, theirs = (
        {name: value for name, value in all_.items() if name.startswith(TRUNK)}
        for all_ in (backbone.model.state_dict(), state)
    )
    if differing := misfits(mine, theirs):
        raise FeatInvError(
            f"{files.folder}: the encoder in it is not the network of {backbone.name}, under timm's names: {differing}."
            " Download or copy the folder again"
        )

    def alike(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a.cpu().float(), b, rtol=NEAR, atol=1e-5 * b.abs().max().item())

    other = [name for name, value in mine.items() if not alike(value, theirs[name])]
    if other and not other_weights:
        raise FeatInvError(
            f"the backbone and the encoder of {files.folder} are both {backbone.name.partition('.')[0]}, with other"
            f" weights ({len(other)} of {len(mine)} tensors differ, such as {other[0]}): the name is the same, the"
            f" network is not. Open the weights of {files.backbone}, or allow other weights if this is meant"
        )
