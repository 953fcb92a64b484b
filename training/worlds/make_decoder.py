"""Makes a feature decoder: one image straight from a feature map, for any timm backbone whose maps are square.

--out becomes a folder in the layout of diffusers' AutoencoderRAE without an encoder, for Load Feature Decoder and
--decoder. Under --work are the checkpoint and panel_decoder.png of images that the training did not see.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from featinv_nodes.core.backbones import LAST, Backbone
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import cosine
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds import drawing_world, open_backbone
from featinv_nodes.worlds.drawn import DRAWN
from featinv_nodes.worlds.drawn.scenes import draw
from featinv_nodes.worlds.photo import PHOTO
from training.files import make_folder
from training.report import panel, save_image

from .feature_decoder import Decoder, Sizes, train_feature_decoder, write_feature_decoder
from .inversion import BATCH
from .photographs import read_photographs

NAME = "decoder"
SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", nargs="+", default=["drawn"], help="drawn, or folders of photographs or tar shards (default: drawn)"
    )
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="minutes of training")
    length.add_argument("--images", type=int, help="images to see")
    parser.add_argument(
        "--pixels-first",
        type=int,
        default=0,
        metavar="N",
        help="images seen with the loss on pixels alone, at less cost; then it also compares the backbone's stages",
    )
    parser.add_argument("--backbone", help="an embedded one, or a timm name or timm-hub folder (default: the world's)")
    parser.add_argument("--backbone-weights", help="its .safetensors file")
    parser.add_argument("--input-size", type=int, help="side in pixels that the backbone reads, where not its own")
    parser.add_argument("--layer", default=LAST, help="whose maps are decoded (default: %(default)s)")
    parser.add_argument("--width", type=int, default=Sizes.width, help="of the transformer (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="of the transformer (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=Sizes.heads, help="of its attention (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=BATCH, help="images per step (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/worlds/decoder"), help="folder (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the checkpoint (default: OUT/work)")


def make(args: argparse.Namespace) -> None:
    """Trains, or continues training. Raises FeatInvError for bad arguments before any work."""
    if args.images is not None and args.images < args.batch:
        raise FeatInvError(f"--images {args.images}: less than one batch of {args.batch}")
    drawn = drawing_world(args.data[0]) if len(args.data) == 1 else None
    name = args.backbone or next(iter((drawn or PHOTO).backbones))
    backbone = open_backbone(name, args.backbone_weights, args.input_size, run_code=True)
    sizes = Sizes(args.width, args.layers, args.heads)
    Decoder(backbone.source(args.layer), sizes)  # raises what it raises before the photographs are read
    make_folder(args.out)
    work = args.work or args.out / "work"
    backbone = backbone.to(args.device, memory_format=torch.channels_last)
    pictures, held_out = source_of(args.data, backbone, args.device)
    train_feature_decoder(
        work,
        NAME,
        backbone,
        args.layer,
        pictures,
        sizes,
        args.device,
        args.pixels_first,
        batch=args.batch,
        images=args.images,
        minutes=args.minutes,
        keep=partial(write_feature_decoder, args.out),
    )
    show(work / f"panel_{NAME}.png", args.out, backbone, args.layer, held_out)
    print(f"wrote {args.out}")


def source_of(data: list[str], backbone: Backbone, device: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Image numbers -> pictures [B, 3, h, w] in 0..1 as the backbone reads them; and pictures that those are not."""
    if data == [DRAWN.name]:

        def pictures(numbers: Tensor) -> Tensor:
            return backbone.preprocess(draw(0, numbers).image, "stretch")

        return pictures, backbone.preprocess(DRAWN.draw(torch.arange(SHOWN, device=device)), "stretch")
    photographs = read_photographs(data, max(backbone.input_size), device)
    return lambda numbers: photographs.random(len(numbers)), photographs.held_out(SHOWN)


def show(file: Path, folder: Path, backbone: Backbone, layer: str, originals: Tensor) -> None:
    """A panel of originals and what the folder's decoder makes of their maps, with the cosine of its pictures' maps."""
    decoder = open_feature_decoder(folder).to(originals.device)
    features = backbone.extract(originals, layer)
    drawn = decoder.decode(features)
    scores = cosine(features, backbone.extract(drawn, layer)).tolist()
    rows = [[(p, "") for p in originals.cpu()], [(p, f"cos {s:.2f}") for p, s in zip(drawn.cpu(), scores)]]
    save_image(panel(rows, ["original", "decoded"], features.source.describe()), file)
    print(f"see {file}")
