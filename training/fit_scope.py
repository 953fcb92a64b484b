"""Fits the scope statistics of a weights file: statistics of held-out feature maps, which rate edited maps.

    python training/fit_scope.py --model FILE --data FOLDER                    in place
    python training/fit_scope.py --model FILE --data FOLDER --count 10000 --out FILE

    python training/fit_scope.py --model photo_lite0_blocks4 --data FOLDER --kept-back --count 1400 --centres 512

FOLDER holds images, or tar files of them, that training did not see; "drawn" stands for held-out scenes of the drawn
world. The statistics are fitted to half of the images, their quantiles to the other half. The first images are
reconstructed for the quantiles of the cycle cosine. Nothing else in the file changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import save_scope
from featinv_nodes.worlds import model_file
from training.cli import model_parser, pipeline_from, require_positive, require_weights_name, run
from training.data.scope import CENTRES, DRAWN, TINY_CENTRES, centres_for, fit
from training.files import make_folder
from training.report import digests_text


def arguments() -> argparse.ArgumentParser:
    parser = model_parser(__doc__, gradient=0.0)
    parser.add_argument(
        "--data",
        required=True,
        help='folder of images, or of tar files of them, that training did not see, or "drawn" for held-out scenes',
    )
    parser.add_argument(
        "--kept-back",
        action="store_true",
        help="use only every 25th image of the folder, on which make_world.py never trains",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=4000,
        help="how many images, spread over the folder; at least 2,000 for the outer quantiles to mean something",
    )
    parser.add_argument(
        "--drawn",
        type=int,
        default=DRAWN,
        help="how many of them are reconstructed for the cycle cosine's quantiles, 0 for none",
    )
    parser.add_argument(
        "--centres", type=int, help=f"directions in the bank (default {CENTRES:,}, in the drawn world {TINY_CENTRES})"
    )
    parser.add_argument("--out", type=Path, help="weights file to write (default: the same one)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    require_positive(args, "count", "centres")
    if not 0 <= args.drawn <= args.count:
        raise FeatInvError(f"--drawn {args.drawn}: expected 0 to --count {args.count}")
    if args.out:
        require_weights_name(args.out)
        make_folder(args.out.parent)
    pipeline, sampling = pipeline_from(args)
    scope = fit(
        pipeline,
        sampling,
        args.data,
        args.count,
        args.drawn,
        args.centres or centres_for(args.data),
        args.batch,
        args.kept_back,
    )
    out = args.out or model_file(args.model)
    save_scope(model_file(args.model), scope, out)
    print(
        f"wrote the scope of {scope.source.describe()}, from {scope.maps:,} images,"
        f" {sum(t.nbytes for t in scope.tensors().values()):,} bytes, to {out}\n{digests_text(pipeline.digests)}"
    )


if __name__ == "__main__":
    run(main)
