"""The drawn world's card: what was trained how, and what it scores."""

from __future__ import annotations

from torch import Tensor

from featinv_nodes.core.metrics import bootstrap, cosine, top_k_match
from featinv_nodes.feature_decoders import open_feature_decoder
from featinv_nodes.worlds import open_backbone
from featinv_nodes.worlds.drawn import DRAWN, FOLDER

from ..evaluation.run import evaluate_in_memory, load_pictures
from ..evaluation.suites.quality import gap_closed
from ..files import write_text
from ..models.pipeline import InversionPipeline, load_pipeline
from ..report import figure_text
from . import autoencoder, backbones, base

COUNT = 500
BASE_SEEN = 14_000_128
DECODER_SEEN = 144_000
#: what no measurement of the files can tell
HISTORY = """
The transformer was trained on the CNN's feature vectors too, and the autoencoder's loss includes the CNN's features.

The inversion models' loss includes cycle consistency (`cycle` in `training/configs/`), and the files recommend guidance
by the gradient. Both optimise the cosine that is reported. So the columns "other backbone" evaluate by the embedded
backbone that took no part in either, and some rows are without the gradient. Guidance scales were chosen on 150
held-out scenes other than those reported, the gradient's steps on 256 others, from number 20,000 on.

The backbones and the autoencoder were trained on two processor cores, the rest on one NVIDIA H100:

    python training/make_world.py drawn --stage base --images 14000000 --batch 512 --lr 2e-3 --graph            5 min
    python training/make_world.py drawn --stage MODEL --images 2345472 --batch 256 --graph                      7 min
    python training/make_world.py drawn --stage tiny_cnn_stage --further --images 5263616 --batch 256 \\
        --lr 1e-3 --graph                                                                                       5 min

The second line trained the three models of spatial maps, at the same time as tiny_cnn_pooled (529,664 images).

Minutes on two processor cores at the default counts, two or three stages at a time: cnn 19, vit 112, autoencoder 7,
decoder 23, base 120 (1,000,000 images), and about 20 per 100,000 images of an inversion model.

The feature decoder, on one core:

    python training/make_world.py decoder --backbone tiny-vit --batch 16 --images 144000 --pixels-first 96000 \\
        --out featinv_nodes/worlds/drawn/decoder_tiny_vit_last --work out/worlds/decoder

The concept file is fitted to the true masks of 4,000 training scenes (stage concepts), each model's scope statistics to
4,000 held-out scenes from number 100,000 on, 1,000 of them reconstructed (stage scope). Each takes about a minute.
"""


def entry(result: dict, percent: bool = False) -> str:
    """A figure with its 95 % interval."""
    return figure_text(result, 1, 100) if percent else figure_text(result)


def second_opinion(
    pipeline: InversionPipeline, pixel_values: Tensor, drawn: dict[str, Tensor], single: Tensor
) -> dict[str, tuple[str, str]]:
    """How faithful pictures are to the embedded backbone that took no part in the model's training: its last layer's
    cosine, and the match of its top-1 shape on scenes of one object. A model that only fools its own backbone fails
    here.
    """
    backbone = open_backbone(DRAWN.independent[pipeline.info.source.backbone])
    original, result = backbone.extract(pixel_values), {}
    part = backbone.groups["shape"]
    for what, pictures in drawn.items():
        again = backbone.extract(backbone.preprocess(pictures, "stretch"))
        match = top_k_match(backbone.logits(original)[:, part], backbone.logits(again)[:, part], 1).float()[single]
        result[what] = (entry(bootstrap(cosine(original, again))), entry(bootstrap(match), percent=True))
    return result


def model_rows() -> list[str]:
    """Two table rows per shipped model, as recommended and without the gradient, unconditional baseline and round trip
    with the first of each backbone and layer."""
    rows = [
        (
            "| model | cosine | unconditional | round trip | gap closed | cosine, mean removed | shape % | colour % |"
            " texture % | background % | other backbone: cosine | shape % |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in DRAWN.models:
        pipeline = load_pipeline(name)
        pixel_values, counts = load_pictures(pipeline, "drawn", COUNT)
        for row, sampling in (
            (name, pipeline.recommended()),
            (f"{name}, without the gradient", pipeline.recommended(gradient=0.0)),
        ):
            results, drawn = evaluate_in_memory(pipeline, pixel_values, sampling, counts == 1)
            other = second_opinion(pipeline, pixel_values, drawn, counts == 1)
            r = results["reconstruction"]
            matches = [
                entry(r[f"{group}_match_single"], percent=True)
                for group in ("shape", "colour", "texture", "background")
            ]
            cells = [
                entry(r["cosine"]),
                f"{results['unconditional']['cosine']['value']:.3f}",
                f"{results['round trip']['cosine']['value']:.3f}",
                f"{gap_closed(results):.1%}",
                entry(r["cosine_centred"]),
                *matches,
                *other["reconstruction"],
            ]
            rows.append(f"| {row} | {' | '.join(cells)} |")
        if name == DRAWN.models[0]:
            c = results["round trip"]
            matches = [
                entry(c[f"{group}_match_single"], percent=True)
                for group in ("shape", "colour", "texture", "background")
            ]
            autoencoder_row = (
                f"| *autoencoder alone* | {entry(c['cosine'])} | | | | {entry(c['cosine_centred'])} |"
                f" {' | '.join([*matches, *other['round trip']])} |"
            )
    return [*rows, autoencoder_row]


def write_card() -> None:
    """Measures everything that is shipped and writes the card."""
    file = FOLDER / "CARD.md"
    lines = [
        "# The drawn world: card",
        "",
        "What the embedded weights for drawn scenes are, how they were made, and how faithful they are. They are a",
        "complete FeatInv set-up at 64 pixels, trained from scratch by `python training/make_world.py drawn` and",
        "measured by `python training/make_world.py drawn --stage card`. Licence: GPL-3.0, like the code. The code",
        "draws the scenes; no other data was used. All files are safetensors, in fp16, the decoder in 8 bits.",
        "",
        "## Parts",
        "",
        "| part | what it is | images seen | seed | score on held-out scenes |",
        "|---|---|---|---|---|",
    ]
    for short in DRAWN.backbones:
        kind = short.removeprefix("tiny-")
        architecture, _ = backbones.SPECS[kind]
        scores = backbones.accuracy(open_backbone(short).model)
        text = ", ".join(f"{group} {100 * value:.1f} %" for group, value in scores.items())
        lines.append(
            f"| {short} | timm `{architecture}`, 8 x 8 x 128 at the last layer | {backbones.RECIPES[kind][0]:,} | 0 |"
            f" {text} (single objects, n = 2,000 scenes) |"
        )
    lines += [
        (
            f"| autoencoder | patches' principal components with residual networks, 8 x 8 x 24 | {autoencoder.STOP:,},"
            f" then {autoencoder.DECODER_IMAGES:,} for the decoder | 0 | see below |"
        ),
        f"| base | diffusers `UNet2DConditionModel` {base.WIDTHS}, velocity, SD 1.x schedule | {BASE_SEEN:,} | 0 | - |",
    ]
    for name in DRAWN.models:
        info = load_pipeline(name).info
        lines.append(
            f"| {name} | ControlNet and encoder for {info.source.describe()} | {info.images_seen:,} |"
            f" {info.config['seed']} | see below |"
        )
    lines += [
        f"| {name} | feature decoder for {open_feature_decoder(name).source.describe()} | {DECODER_SEEN:,} | 0 |"
        " [beside other methods](../../../docs/methods.md) |"
        for name in DRAWN.decoders
    ]
    lines += [
        HISTORY,
        f"## Reconstruction of {COUNT} held-out scenes",
        "",
        "At each file's recommended setting, with the scene's number as seed and 95 % bootstrap intervals.",
        "",
        "- *unconditional*: the base model without features. *round trip*: the autoencoder alone. Guidance by the",
        "  gradient searches for latents, and can be better than the round trip.",
        "- *gap closed*: where the cosine lies between unconditional (0 %) and round trip (100 %).",
        "- *shape %* and others: how often the backbone's top-1 class is the original's, on scenes of one object.",
        "- *other backbone*: by the embedded backbone that took no part in training or sampling.",
        "",
        *model_rows(),
        "",
    ]
    lines += [
        "Recommended settings: " + "; ".join(f"{n} {load_pipeline(n).info.recommended}" for n in DRAWN.models) + ".",
        "",
    ]
    write_text(file, "\n".join(lines))
    print(f"wrote {file}")
