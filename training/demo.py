"""The whole method on the embedded default: invert held-out pictures and the user's, interpolate two, compose two.

    python training/demo.py [--image FILE ...] [--out DIR]

Writes panel.png, index.html (opens without a server) and results.json.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

print("loading PyTorch and diffusers ...", flush=True)
import diffusers
import timm
import torch
from torch import Tensor

from featinv_nodes.core.feature_map import FeatInvError
from featinv_nodes.core.images import read_image
from featinv_nodes.core.metrics import cosine_per_location
from featinv_nodes.core.mixing import at_grid, compose, interpolate
from featinv_nodes.worlds import MODELS
from training.cli import make_folder, run, write_json, write_text
from training.evaluate import evaluate, gap_closed, load_pictures
from training.models.inversion import Opened, open_model
from training.models.pipeline import Sampling
from training.report import Cell, page, panel, save_image

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN = 10


def say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def captions(pictures: Tensor, scores: Tensor) -> list[Cell]:
    return [(x, f"cos {c:.2f}") for x, c in zip(pictures, scores.tolist())]


def mixed(opened: Opened, framed: Tensor, how: Sampling) -> tuple[list[Cell], list[dict]]:
    """Reconstructions of convex combinations of two pictures' feature maps (paper Fig. 7), one seed."""
    features = opened.features(framed[:2])
    maps = [interpolate([features.select(0), features.select(1)], [1 - w, w]) for w in WEIGHTS]
    drawn = [opened.draw(m, how, opened.noise([0])) for m in maps]
    scores = torch.cat([opened.score(m, x) for m, x in zip(maps, drawn)])
    return captions(torch.cat(drawn), scores), [{"weight": w, "cosine": c} for w, c in zip(WEIGHTS, scores.tolist())]


def composed(opened: Opened, framed: Tensor, how: Sampling) -> tuple[list[Cell], dict]:
    """The left half of one picture's map beside the right half of another's (paper Fig. 8), and how well each half
    of the drawn picture agrees with the map it was given."""
    features = opened.features(framed[:2])
    mask = torch.zeros(1, *framed.shape[2:])
    mask[:, :, : framed.shape[3] // 2] = 1
    wanted = compose(features.select(0), features.select(1), mask)
    drawn = opened.draw(wanted, how, opened.noise([0]))
    agreement = cosine_per_location(wanted, opened.see(drawn))
    inside = at_grid(mask, wanted.source.grid)[:, 0].bool()
    cells = [(framed[0], "left half from"), (framed[1], "right half from"), *captions(drawn, agreement.mean((1, 2)))]
    return cells, {"cosine_inside": agreement[inside].mean().item(), "cosine_outside": agreement[~inside].mean().item()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", nargs="*", default=[], help="pictures of yours to invert as well")
    parser.add_argument("--model", default="tiny_cnn_last", choices=MODELS)
    parser.add_argument("--count", type=int, default=64, help="held-out pictures to measure on")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    args = parser.parse_args(argv)
    began = time.perf_counter()
    make_folder(args.out)
    own_files = args.image
    own = [read_image(f) for f in own_files]
    say("opening the embedded backbone, diffusion model and inversion model")
    opened = open_model(args.model)
    how = opened.recommended()
    if args.count < 6:
        raise FeatInvError(f"--count {args.count}: the demo shows six pictures; give at least as many")
    framed, counts = load_pictures(opened, "drawn", args.count)
    say(f"inverting {len(framed)} held-out pictures, then drawing as many without features for comparison ({how.steps} steps each)")
    results, drawn = evaluate(opened, framed, how, counts == 1)
    scores = opened.score(opened.features(framed[:SHOWN]), drawn["reconstruction"][:SHOWN])
    rows = [[(x, "") for x in framed[:SHOWN]], captions(drawn["reconstruction"][:SHOWN], scores), [(x, "") for x in drawn["floor"][:SHOWN]]]
    titles = ["original", "reconstruction\nfrom features", "drawn without\nfeatures"]
    notes = []
    if own:
        say(f"inverting your {len(own)} picture(s)")
        seen = torch.cat([opened.backbone.frame(x) for x in own])
        wanted = opened.features(seen)
        redrawn = opened.draw(wanted, how, opened.noise(range(len(seen))))
        cells = [c for pair in zip([(x, Path(f).name[:18]) for x, f in zip(seen, own_files)], captions(redrawn, opened.score(wanted, redrawn))) for c in pair]
        rows += [cells[i : i + SHOWN] for i in range(0, len(cells), SHOWN)]
        titles += ["your pictures,\nas seen"] + [""] * (len(rows) - len(titles) - 1)
        notes = [opened.world.outside]
    say("interpolating between two feature maps")
    cells, interpolation = mixed(opened, framed, how)
    rows.append([(framed[0], "first"), *cells, (framed[1], "second")])
    titles.append("interpolation")
    say("composing two feature maps")
    cells, composition = composed(opened, framed[[5, 4]], how)
    rows.append(cells)
    titles.append("composition")

    r = {k: {m: e["value"] for m, e in v.items()} for k, v in results.items()}
    summary = (
        f"{len(framed)} held-out pictures: cosine {r['reconstruction']['cosine']:.3f} (without features {r['floor']['cosine']:.3f}, "
        f"autoencoder alone {r['ceiling']['cosine']:.3f}: {gap_closed(results):.0%} of the way); shape match {r['reconstruction']['top1_match']:.0%}"
    )
    sheet = panel(rows, titles, f"FeatInv on the embedded world: {opened.info.source.describe()}", notes[0] if notes else "")
    save_image(sheet, args.out / "panel.png")
    write_text(args.out / "index.html", page("FeatInv: what the model sees", sheet, [summary, *notes]))
    seconds = time.perf_counter() - began
    write_json(args.out / "results.json", {
        "model": args.model,
        "reconstruction": {
            "n": len(framed), "cosine_mean": r["reconstruction"]["cosine"], "cosine_centred": r["reconstruction"]["cosine_centred"],
            "top1_match": r["reconstruction"]["top1_match"], "top5_match": r["reconstruction"]["top5_match"],
            "cosine_floor": r["floor"]["cosine"], "cosine_ceiling": r["ceiling"]["cosine"],
        },
        "interpolation": interpolation, "composition": composition, "notes": notes, "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__, "timm": timm.__version__},
    })
    say(summary)
    say(f"done in {seconds:.0f} s: see {args.out / 'panel.png'} and {args.out / 'index.html'}")


if __name__ == "__main__":
    run(main)
