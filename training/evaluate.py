"""Measures how faithful an inversion model is, beside its floor and its ceiling.

    python training/evaluate.py                                     the embedded model, 500 held-out scenes
    python training/evaluate.py --model FILE --data FOLDER --count 1000 --out DIR

Floor: pictures that the base model draws without features. Ceiling: the autoencoder's round trip of the originals.
Writes results.json, report.md and panel.png.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.feature_map import FeatInvError, FeatureMap
from featinv_nodes.core.metrics import bootstrap, cosine, frechet_distance, top_k_match
from featinv_nodes.tiny_world.scenes import draw
from training.cli import make_folder, model_parser, open_from, run, write_json, write_text
from training.data import SUFFIXES
from training.images import read_image
from training.inversion import Opened
from training.pipeline import Sampling, round_trip
from training.report import panel, save_image


def load_pictures(opened: Opened, data: str, count: int) -> tuple[Tensor, Tensor | None]:
    """(pictures framed for the backbone [N, 3, H, W], objects per scene [N] or None for a folder)."""
    if data == "tiny":
        scenes = draw(0, torch.arange(count), "held-out")
        return opened.backbone.frame(scenes.image), scenes.count
    files = sorted(f for f in Path(data).rglob("*") if f.suffix.lower() in SUFFIXES)[:count]
    if len(files) < count:
        raise FeatInvError(f"{data} holds {len(files)} images; asked for {count}. Give a folder with more, or a smaller --count")
    return torch.cat([opened.backbone.frame(read_image(f)) for f in tqdm(files, desc="reading")]), None


def measure(opened: Opened, original: FeatureMap, last: FeatureMap, pictures: Tensor, single: Tensor | None) -> tuple[dict, Tensor]:
    """Faithfulness of pictures to the originals: every entry {"value", "low", "high", "n"} with a 95 % interval; and
    the pictures' pooled last-layer vectors [N, C]. original: the maps asked for; last: the originals' last layer.

    cosine, cosine_centred (the originals' mean vector removed), top-1 and top-5 match of the backbone's classes; in
    the embedded world also the top-1 match of every label group on scenes of a single object.
    """
    seen = opened.see(pictures)
    centre = original.values.mean((0, 2, 3))
    again = opened.backbone.extract(opened.backbone.frame(pictures, "stretch"))
    logits = [opened.backbone.logits(x) for x in (last, again)]
    found = {"cosine": cosine(original, seen), "cosine_centred": cosine(original, seen, centre)}
    groups = opened.backbone.groups
    first = next(iter(groups.values()))
    for k in (1, 5):
        found[f"top{k}_match"] = top_k_match(logits[0][:, first], logits[1][:, first], k).float()
    if single is not None:
        for name, part in groups.items():
            found[f"{name}_match_single"] = top_k_match(logits[0][:, part], logits[1][:, part], 1).float()[single]
    return {name: bootstrap(values) for name, values in found.items()}, again.pool().values.flatten(1)


def evaluate(opened: Opened, framed: Tensor, how: Sampling, single: Tensor | None = None, batch: int = 32) -> tuple[dict, dict[str, Tensor]]:
    """All figures of a model on framed pictures, picture i drawn with seed i: ({"reconstruction", "floor", "ceiling"},
    the pictures of each). The Frechet distance is in the backbone's own pooled feature space; it is no FID."""
    original = opened.features(framed)
    start = opened.noise(range(len(framed)))
    with tqdm(total=2 * len(framed), desc="drawing", unit="picture") as bar:
        drawn = {"reconstruction": opened.draw(original, how, start, batch, bar.update)}
        drawn["floor"] = opened.draw(None, how, start, batch, bar.update)
    drawn["ceiling"] = torch.cat([round_trip(opened.base, part) for part in framed.split(64)])
    results, last = {}, opened.backbone.extract(framed)
    for name, pictures in drawn.items():
        results[name], vectors = measure(opened, original, last, pictures, single)
        results[name][f"frechet_distance ({opened.backbone.name}, pooled)"] = {"value": frechet_distance(last.pool().values.flatten(1), vectors), "n": len(vectors)}
    return results, drawn


def gap_closed(results: dict, name: str = "cosine") -> float:
    """How far the reconstruction comes on the way from floor (0) to ceiling (1)."""
    low, mid, high = (results[k][name]["value"] for k in ("floor", "reconstruction", "ceiling"))
    return (mid - low) / (high - low)


def to_markdown(title: str, results: dict) -> str:
    """A table: a row per measure, columns floor, reconstruction, ceiling, with 95 % intervals."""
    lines = [f"# {title}", "", "| measure | floor | reconstruction | ceiling |", "|---|---|---|---|"]
    for name in results["reconstruction"]:
        cells = []
        for column in ("floor", "reconstruction", "ceiling"):
            entry = results[column][name]
            cells.append(f"{entry['value']:.3f}" + (f" ({entry['low']:.3f} to {entry['high']:.3f})" if "low" in entry else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nCosine: {gap_closed(results):.1%} of the way from floor to ceiling.\n"


def main(argv: list[str] | None = None) -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--data", default="tiny", help='folder of images, or "tiny" for held-out scenes')
    parser.add_argument("--count", type=int, default=500, help="how many pictures")
    parser.add_argument("--out", type=Path, default=Path("out/evaluate"))
    args = parser.parse_args(argv)
    make_folder(args.out)
    opened, how = open_from(args)
    framed, counts = load_pictures(opened, args.data, args.count)
    results, drawn = evaluate(opened, framed, how, None if counts is None else counts == 1, args.batch)
    scores = opened.score(opened.features(framed[:10]), drawn["reconstruction"][:10]).tolist()
    rows = [[(x, "") for x in framed[:10]], [(x, f"cos {c:.2f}") for x, c in zip(drawn["reconstruction"], scores)]]
    rows += [[(x, "") for x in drawn[name][:10]] for name in ("ceiling", "floor")]
    titles = ["original", "reconstruction", "autoencoder\nround trip", "no features"]
    save_image(panel(rows, titles, f"{args.model}: {opened.info.source.describe()}"), args.out / "panel.png")
    write_json(args.out / "results.json", {
        "model": args.model, "data": args.data, "sampling": asdict(how), "seeds": "picture number",
        "source": opened.info.source.to_dict(), "gap_closed": gap_closed(results), **results,
    })
    text = to_markdown(args.model, results)
    write_text(args.out / "report.md", text)
    print(text)


if __name__ == "__main__":
    run(main)
