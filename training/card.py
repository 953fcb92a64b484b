"""The embedded world's card: what was trained how, and what it scores."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from featinv_nodes.core.metrics import bootstrap, cosine, top_k_match
from featinv_nodes.tiny_world import BACKBONES, FOLDER, MODELS, open_backbone

from .evaluate import evaluate, gap_closed, load_pictures
from .inversion import Opened, open_model
from .tiny import autoencoder, backbones, base

COUNT = 500
#: what no measurement of the files can tell
HISTORY = """
The transformer also learned from the CNN's feature vectors, and the autoencoder's loss includes the CNN's features.

The inversion models' loss includes the cycle consistency (`cycle` in `training/configs/`), so they were trained towards
the cosine that is reported; the columns "other backbone" ask the embedded backbone that took no part in their training. The counts of
their images include earlier states of the same models, trained without it on a base model that had seen 345,600
pictures (tiny_cnn_last 208,000, tiny_cnn_stage 32,000, tiny_cnn_pooled 12,800, and tiny_vit_last 104,000 for an earlier
state of the transformer). The last 36,032 of tiny_cnn_last are a run of their own, `--init-from` the file that the stage made,
`--rate 6e-4 --cycle 3`.

Minutes that the stages took, two or three side by side on two processor cores: cnn 19, vit 112, autoencoder 7, decoder
23, base 120, tiny_cnn_last 98, tiny_cnn_stage 36, tiny_cnn_pooled 10, tiny_vit_last 47.
"""


def entry(result: dict, percent: bool = False) -> str:
    """A figure with its 95 % interval."""
    scale, digits = (100, 1) if percent else (1, 3)
    return " ".join(
        f"{a}{result[k] * scale:.{digits}f}{b}" for k, a, b in (("value", "", ""), ("low", "(", " to"), ("high", "", ")"))
    )


def second_opinion(opened: Opened, framed: Tensor, drawn: dict[str, Tensor], single: Tensor) -> dict[str, tuple[str, str]]:
    """How faithful pictures are to the embedded backbone that took no part in the model's training: its last layer's
    cosine, and the match of its top-1 shape on scenes of one object. A model that only fools its own backbone fails here."""
    (name,) = [short for short, (_, full) in BACKBONES.items() if full != opened.info.source.backbone]
    backbone = open_backbone(name)
    original, found = backbone.extract(framed), {}
    part = backbone.groups["shape"]
    for what, pictures in drawn.items():
        again = backbone.extract(backbone.frame(pictures, "stretch"))
        match = top_k_match(backbone.logits(original)[:, part], backbone.logits(again)[:, part], 1).float()[single]
        found[what] = (entry(bootstrap(cosine(original, again))), entry(bootstrap(match), percent=True))
    return found


def model_rows() -> list[str]:
    """A table row per shipped model, floor and ceiling with the first of each backbone and layer."""
    rows = [
        "| model | cosine | floor | ceiling | way closed | cosine, mean removed | shape % | colour % | texture % | background % | other backbone: cosine | shape % |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        opened = open_model(name)
        framed, counts = load_pictures(opened, "tiny", COUNT)
        results, drawn = evaluate(opened, framed, opened.recommended(), counts == 1)
        other = second_opinion(opened, framed, drawn, counts == 1)
        r = results["reconstruction"]
        matches = [entry(r[f"{group}_match_single"], percent=True) for group in ("shape", "colour", "texture", "background")]
        cells = [entry(r["cosine"]), f"{results['floor']['cosine']['value']:.3f}", f"{results['ceiling']['cosine']['value']:.3f}",
                 f"{gap_closed(results):.1%}", entry(r["cosine_centred"]), *matches, *other["reconstruction"]]  # fmt: skip
        rows.append(f"| {name} | {' | '.join(cells)} |")
        if name == MODELS[0]:
            c = results["ceiling"]
            matches = [entry(c[f"{group}_match_single"], percent=True) for group in ("shape", "colour", "texture", "background")]
            ceiling = f"| *autoencoder alone* | {entry(c['cosine'])} | | | | {entry(c['cosine_centred'])} | {' | '.join([*matches, *other['ceiling']])} |"
    return [*rows, ceiling]


def write_card(file: Path = FOLDER / "CARD.md") -> None:
    """Measures everything that is shipped and writes the card."""
    lines = [
        "# The embedded world: card", "",
        "Weights of a complete FeatInv set-up at 64 pixels, made from nothing by `python training/make_tiny_world.py` and",
        "measured by `python training/make_tiny_world.py --stage card`. Licence: GPL-3.0, like the code; the pictures are",
        "drawn by the code, no foreign data took part. All files are fp16 safetensors.", "",
        "## Parts", "", "| part | what it is | pictures seen | seed | score on held-out scenes |", "|---|---|---|---|---|",
    ]
    for short in BACKBONES:
        kind = short.removeprefix("tiny-")
        architecture, _ = backbones.SPECS[kind]
        scores = backbones.accuracy(open_backbone(short).model)
        text = ", ".join(f"{group} {100 * value:.1f} %" for group, value in scores.items())
        lines.append(f"| {short} | timm `{architecture}`, 8 x 8 x 128 at the last layer | {backbones.RECIPES[kind][0]:,} | 0 | {text} (single objects, n = 2,000 scenes) |")
    lines += [
        f"| autoencoder | patches' principal components with residual networks, 8 x 8 x 24 | {autoencoder.STOP:,}, then {autoencoder.DECODER_IMAGES:,} for the decoder | 0 | see below |",
        f"| base | diffusers `UNet2DConditionModel` {base.WIDTHS}, velocity, SD 1.x schedule | {base.IMAGES:,} | 0 | - |",
    ]
    for name in MODELS:
        info = open_model(name).info
        lines.append(f"| {name} | ControlNet and encoder for {info.source.describe()} | {info.images_seen:,} | {info.config['seed']} | see below |")
    lines += [
        HISTORY, f"## Reconstruction of {COUNT} held-out scenes", "",
        "At each file's recommended setting, picture number as seed; 95 % bootstrap intervals. Floor: the base model without",
        "features. Ceiling: the autoencoder's round trip. Matches: the backbone's own top-1 class on scenes of one object.", "",
        *model_rows(), "",
    ]
    lines += ["Recommended settings: " + "; ".join(f"{n} {open_model(n).info.recommended}" for n in MODELS) + ".", ""]
    file.write_text("\n".join(lines))
    print(f"wrote {file}")
