"""Runs a suite: its options, the records of its images, its report."""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import Sampling
from featinv_nodes.worlds import drawing_world
from featinv_nodes.worlds.drawn.scenes import draw

from ..cli import SAMPLING, model_parser, require_device, require_positive
from ..files import make_folder
from ..models.pipeline import InversionPipeline
from ..models.sampling import round_trip
from .context import ORIGINAL, EvalContext
from .evaluator import Evaluator
from .metrics import mean_entry, set_entries
from .report import write
from .shards import Store, Table, aligned, record
from .sources import Source, open_source, read
from .spaces import TimmSpace, scaled
from .suites import SUITES
from .suites.base import Suite

#: options that decide no figure
IDLE = ("out", "batch", "device", "write_back")
IN_MEMORY = 32  # pictures drawn at once where there is no --batch


def load_pictures(pipeline: InversionPipeline, data: str, count: int) -> tuple[Tensor, Tensor | None]:
    """(pictures preprocessed for the backbone [N, 3, H, W], objects per scene [N] or None for photographs)."""
    originals, _ = read(open_source(data, count), range(count))
    return originals.preprocess(pipeline.backbone), (
        draw(0, torch.arange(count), "held-out").count if drawing_world(data) else None
    )


def evaluate_in_memory(
    pipeline: InversionPipeline, pixel_values: Tensor, sampling: Sampling, single: Tensor | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """The suite quality for a few pictures in memory, without files: ({"reconstruction", "unconditional", "round
    trip"}, the pictures of each). Picture i is drawn with seed i; single [N]: scenes of one object, None for
    photographs."""
    source = pipeline.info.source
    evaluator, space = (
        Evaluator(pipeline.backbone, {"cosine": (source.layer, source.pooled)}),
        TimmSpace(pipeline.backbone),
    )
    original, start = pipeline.features(pixel_values), pipeline.noise(range(len(pixel_values)))
    with tqdm(total=2 * len(pixel_values), desc="drawing", unit="image") as bar:
        drawn = {"reconstruction": pipeline.draw(original, sampling, start, IN_MEMORY, bar.update)}
        drawn["unconditional"] = pipeline.draw(None, sampling, start, IN_MEMORY, bar.update)
    drawn["round trip"] = torch.cat([round_trip(pipeline.base, part) for part in pixel_values.split(64)])
    side = pipeline.base.resolution
    target, vectors, results = evaluator.extract(pixel_values), space(scaled(pixel_values, side)), {}
    evaluator.centres = {name: means.mean(0) for name, means in evaluator.means(target).items()}
    for name, pictures in drawn.items():
        columns = evaluator.compare(target, evaluator.extract(pictures), single)
        results[name] = {measure: mean_entry(values) for measure, values in columns.items()} | set_entries(
            space.name, vectors, space(scaled(pictures, side))
        )
    return results, drawn


def arguments(description: str = "") -> argparse.ArgumentParser:
    """The options of evaluate.py."""
    parser = model_parser(description)
    parser.add_argument("--suite", choices=SUITES, default="quality")
    parser.add_argument("--data", default="drawn", help="SOURCE, see above")
    parser.add_argument(
        "--count",
        type=int,
        help="how many images, evenly spread over their names (default: all; of the drawn world what the suite sets)",
    )
    parser.add_argument("--per-class", type=int, help="take this many of each class folder, the first by name")
    parser.add_argument(
        "--kept-back",
        action="store_true",
        help="use only every 25th image, on which make_world.py never trains: to choose settings",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        help=(
            "for layers, cross-model and rcdm: weights files, each FILE or FILE=BACKBONE with a timm-hub folder"
            " (default: embedded ones)"
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="added to an image's number, which is its seed")
    parser.add_argument(
        "--paper",
        action="store_true",
        help=(
            "timesteps, crop, sampling, noise, counts and reference set as in the paper's tables; other options change"
            " single settings of it"
        ),
    )
    parser.add_argument("--inception", help="torch-fidelity's Inception weights, for FID and KID")
    parser.add_argument(
        "--set-size",
        type=int,
        help="side in pixels of the images that are compared as sets (default: what the base model generates)",
    )
    parser.add_argument(
        "--space",
        help=(
            "timm-hub folder or name of the model in whose feature space sets are compared (default: the model's"
            " backbone)"
        ),
    )
    parser.add_argument("--space-weights", help="its .safetensors file")
    parser.add_argument("--out", type=Path, help="folder of the results (default: out/evaluate/SUITE)")
    for suite in SUITES.values():
        suite.add_arguments(parser.add_argument_group(suite.name))
    return parser


def file_digest(file: Path) -> str:
    """Tells two weights files apart, by all but the recommended settings: those that are used are among the
    samplings."""
    sha = hashlib.sha256()
    with open(file, "rb") as opened:
        if file.suffix == ".safetensors":  # the length of the header, the header, the tensors
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            about = json.loads(header.get("__metadata__", {}).get("featinv", "{}"))
            about.pop("recommended", None)
            sha.update(
                json.dumps(
                    [header | {"__metadata__": header.get("__metadata__", {}) | {"featinv": about}}], sort_keys=True
                ).encode()
            )
        while block := opened.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]


def command_of(args: argparse.Namespace) -> str:
    """The command that gives the same figures: the options that differ from their defaults, but for those that decide
    no figure."""
    words = []
    for action in arguments()._actions:
        value = getattr(args, action.dest, None)
        if action.dest in (*IDLE, "help") or value == action.default:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [action.option_strings[0], *map(str, values)]
    return shlex.join(["python", "training/evaluate.py", *words])


def run_suite(args: argparse.Namespace) -> None:
    """Makes a suite's missing records, and its report. args: of arguments(). Raises FeatInvError for what does not go
    together, before any work."""
    require_positive(args, "batch", "count", "per_class", "set_size")
    require_device(args.device)
    # processes that finish early wait for the others
    dist_state = PartialState(cpu=args.device == "cpu", timeout=timedelta(days=7))
    kind, out = SUITES[args.suite], args.out or Path("out/evaluate") / args.suite
    source = source_of(args, kind)
    if (args.best_of or 1) > 1 and not kind.chooses:
        raise FeatInvError(
            f"--best-of {args.best_of}: suite {args.suite} samples each image once; quality, layers and others choose"
            " among several"
        )
    suite = kind(context_of(args, source, str(dist_state.device) if args.device == "cuda" else args.device), args)
    conditions, store = suite.all_conditions(), Store(out, len(source.names))
    settings = settings_of(args, suite, source)
    if dist_state.is_main_process:
        make_folder(out)
        store.begin(settings)
    dist_state.wait_for_everyone()
    first = {name: condition for name, condition in conditions.items() if name.startswith(ORIGINAL)}
    others = {name: condition for name, condition in conditions.items() if name not in first}
    record(store, source, first, args.batch, dist_state)
    originals = {name: store.table(name) for name in first}
    if any(not table.numbers for table in originals.values()):
        name, reason = next(iter(originals[next(iter(first))].skipped.items()))
        raise FeatInvError(f"none of the {store.count} images of {args.data} can be read; the first, {name}: {reason}")
    suite.centre(originals)
    record(store, source, others, args.batch, dist_state)
    if dist_state.is_main_process:
        finish(store, source, suite, list(conditions), settings)


def source_of(args: argparse.Namespace, kind: type[Suite]) -> Source:
    """The pictures that the arguments name; of the drawn world as many as the suite sets, with --paper those of the
    paper."""
    count, per_class, most = args.count, args.per_class, None
    if drawing_world(args.data):
        count = count or kind.count
    elif args.paper and count is None and per_class is None:
        per_class, most = kind.papers.per_class, kind.papers.count
    return open_source(args.data, count, per_class, args.kept_back, most)


def context_of(args: argparse.Namespace, source: Source, device: str) -> EvalContext:
    """What the arguments say of models, sampling and feature spaces."""
    return EvalContext(
        source,
        device,
        changes={name: getattr(args, name) for name in SAMPLING},
        seed=args.seed,
        inception=args.inception,
        space=args.space,
        space_weights=args.space_weights,
        side=args.set_size,
        papers=args.paper,
        precision=args.precision,
    )


def settings_of(args: argparse.Namespace, suite: Suite, source: Source) -> dict:
    """Everything that decides a figure, by which a folder's records are known again."""
    return {name: value for name, value in vars(args).items() if name not in IDLE} | {
        "pictures": source.fingerprint,
        "files": {name: file_digest(file) for name, file in suite.files().items()},
        "weights": suite.weight_digests(),
        "sampling": suite.settings(),
        "sets": suite.sets(),
    }


def finish(store: Store, source: Source, suite: Suite, conditions: list[str], settings: dict) -> None:
    """Writes the report of the records and prints it."""
    tables: dict[str, Table] = aligned({name: store.table(name) for name in conditions})
    skipped = tables[conditions[0]].skipped
    notes = [*suite.allowed(), *source.notes, *suite.no_match()]
    if skipped:
        named = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:20])
        more = " and more, see results.json" if len(skipped) > 20 else ""
        notes.append(f"{len(skipped)} of {store.count} images could not be read and were left out: {named}{more}.")
    count = len(tables[conditions[0]].numbers)
    notes += suite.departures(count)
    about = {
        "suite": suite.name,
        "model": suite.args.model,
        "data": suite.args.data,
        "count": count,
        "seeds": suite.context.seeds,
        "command": command_of(suite.args),
        "digests": settings["files"] | settings["weights"],
        "sets": settings["sets"],
        "sampling": suite.settings(),
        "settings": settings,
        "skipped": skipped,
    }
    print(write(store.folder, suite.report(tables), about, notes))
    suite.afterwards()
