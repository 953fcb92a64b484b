"""Fits a linear map of feature space to a change of images. Writes a file and a page about it.

    python training/fit_linear_map.py --change hue:120 --out FILE               (drawn scenes and their CNN)
    python training/fit_linear_map.py --data FOLDER --backbone tf_efficientnet_lite0.in1k --layer blocks.4 \\
        --change grayscale --out FILE
    python training/fit_linear_map.py --data FOLDER --changed FOLDER --backbone ... --out FILE   (any change, by names)

The map changes the vector at every location in the same way. It is affine (ridge regression), a rotation (orthogonal
Procrustes) or a direction. All three are measured on held-out images; --kind chooses the one to write. If an
embedded inversion model inverts the layer, or --model names one, the mapped maps are inverted. FILE is for
the node Load Linear Map and for reconstruct.py --linear-map. Beside it, NAME.html is the page and NAME.json has the
figures.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.linear_map_files import save_linear_map
from featinv_nodes.core.linear_maps import KINDS
from featinv_nodes.worlds import BACKBONES, model_file, open_backbone
from training.cli import add_device, require_device, require_positive, require_weights_name, run
from training.evaluation.report import Report, to_html
from training.files import make_folder, write_json, write_text
from training.spaces.changes import FORMS, change_of
from training.spaces.linear import draw, drawn_table, fit, fitting_model, kinds_table, undrawn
from training.spaces.parts import add_parts, split

NO_MODEL = "none"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_parts(parser)
    change = parser.add_mutually_exclusive_group(required=True)
    change.add_argument("--change", help=f"what is done to the images: {FORMS}")
    change.add_argument("--changed", type=Path, help="folder with a changed image of the same name for each image")
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="which kind of map is written")
    parser.add_argument(
        "--backbone", default="tiny-cnn", help=f"timm-hub folder or name, or one of {', '.join(BACKBONES)}"
    )
    parser.add_argument("--backbone-weights", help="the backbone's .safetensors file")
    parser.add_argument("--input-size", type=int, help="side in pixels of what the backbone reads, where not its own")
    parser.add_argument("--layer", default=LAST, help="layer of the backbone")
    parser.add_argument(
        "--model",
        help=f"inversion model for the measurements (default: the shipped one of the layer); {NO_MODEL} for none",
    )
    parser.add_argument("--drawn", type=int, default=16, help="held-out images to invert")
    parser.add_argument("--batch", type=int, default=16, help="images sampled at once")
    parser.add_argument("--out", type=Path, default=Path("out/linear_map.safetensors"), help="the file to write")
    add_device(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    require_positive(args, "count", "held_out_count", "drawn", "batch")
    require_weights_name(args.out)
    require_device(args.device)
    how = args.changed or change_of(args.change)
    if args.changed and args.held_out:
        raise FeatInvError("--changed has images for --data alone; leave out --held-out")
    parts = split(args.data, args.count, args.held_out, args.held_out_count)
    make_folder(args.out.parent)
    backbone = open_backbone(args.backbone, args.backbone_weights, args.input_size, run_code=True).to(args.device)
    source = backbone.source(args.layer)
    model = args.model or fitting_model(source)
    if args.model not in (None, NO_MODEL):
        model_file(args.model)  # said before the work
    change = args.change or f"as in {args.changed.name}"
    fitted = fit(backbone, args.layer, parts, how, args.drawn, change=change, data=Path(args.data).name)
    linear = fitted.maps[args.kind]
    save_linear_map(args.out, linear)

    report = Report(f"Linear map: {linear.describe()}", {}, [kinds_table(fitted.maps)])
    if model and model != NO_MODEL:
        drawn = draw(model, linear, fitted.pictures, args.batch, args.device)
        report.grids.append(drawn_table(drawn, model))
        report.panels, report.figures = {"panel": drawn.panel}, drawn.figures
    else:
        report.panels = {"panel": undrawn(linear, fitted.pictures)}
        report.lines = ["No inversion model of this layer was named, so the mapped maps are not inverted."]
    fitted_to, measured_on = (len(part) - len(part.unreadable) for part in parts)
    notes = [f"Fitted to {fitted_to} images, measured on {measured_on} others.", *parts[0].unreadable]
    notes += parts[1].unreadable
    write_text(args.out.with_suffix(".html"), to_html(report, notes))
    about = {"source": asdict(source), "settings": linear.settings, "kind": args.kind, "notes": notes}
    about |= {"kinds": {kind: one.measured for kind, one in fitted.maps.items()}, "drawn": report.figures}
    write_json(args.out.with_suffix(".json"), about)
    for grid in report.grids:
        print(grid.title, *(" | ".join(row) for row in [grid.header, *grid.rows]), grid.note, "", sep="\n")
    print(*notes, f"wrote {linear.describe()} to {args.out}; look at {args.out.with_suffix('.html')}", sep="\n")


if __name__ == "__main__":
    run(main)
