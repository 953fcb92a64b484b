"""Downloads what a training configuration or a feature decoder needs from the Hugging Face hub into ComfyUI's model
folders.

    python training/download.py CONFIG [--to DIR] [--base REPOSITORY]
    python training/download.py rae-dinov2-base [--to DIR]
    python training/download.py inception [--to DIR]

CONFIG: a YAML file, or the name of one in training/configs. Its backbone (a timm name) goes to DIR/backbones/NAME, its
base model (owner/name of a Stable Diffusion 1.x repository in diffusers' layout) to DIR/diffusers/NAME; a single file
(owner/name/FILE.safetensors or .ckpt), ComfyUI's usual form, to DIR/checkpoints. Embedded and local models need no
download. A feature decoder goes to DIR/featinv_decoders/NAME, with its backbone. inception: the weights that FID and
KID as published need (evaluate.py --inception), from torch-fidelity's release to DIR/inception. The same command
continues an interrupted download. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.model_folder import INDEX, STEM, WHOLE
from featinv_nodes.feature_decoders import find_decoder
from featinv_nodes.worlds import BACKBONES, find_world
from training.config import CONFIGS, TrainConfig, read_config
from training.evaluation.inception import URL
from training.models.hub import Repository, Unreachable, fetch_release

HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<file>\w[\w.-]*\.(safetensors|ckpt)))?")
SHARD = re.compile(rf"{STEM}-\d{{5}}-of-(?P<count>\d{{5}})\.safetensors")
#: what is typed -> the repository of a released feature decoder, and its backbone
DECODERS = {
    name: (f"nyu-visionx/RAE-{repository}", backbone)
    for name, repository, backbone in (
        ("rae-dinov2-small", "dinov2-wReg-small-ViTXL-n08", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("rae-dinov2-base", "dinov2-wReg-base-ViTXL-n08", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("rae-dinov2-base-i512", "dinov2-wReg-base-ViTXL-n08-i512", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("rae-dinov2-large", "dinov2-wReg-large-ViTXL-n08", "vit_large_patch14_reg4_dinov2.lvd142m"),
        ("rae-siglip2-base", "siglip2-base-p16-i256-ViTXL-n08", "vit_base_patch16_siglip_256.v2_webli"),
        ("rae-mae-base", "mae-base-p16-ViTXL-n08", "vit_base_patch16_224.mae"),
    )
}
INCEPTION = "inception"  # what is typed for the weights that FID is defined on
MODEL_PARTS = ("unet", "vae", "text_encoder")


@dataclass(frozen=True)
class Need:
    """A repository to bring. folder: where its files go. choose: names that are there -> the ones to take, each with
    its name here; raises FeatInvError if one lacks. use: options of the training programs. node: its place in
    ComfyUI."""

    repository: str
    folder: Path
    choose: Callable[[Collection[str]], dict[str, str]]
    use: list[str]
    node: str


def needs(config: TrainConfig, to: Path) -> list[Need]:
    """What a configuration lacks here. Raises FeatInvError for names that neither this disk nor the hub can have."""
    return [need for need in (_backbone(config, to), _base(config.base, to)) if need]


def decoder_needs(name: str, to: Path) -> list[Need]:
    """A released feature decoder and its backbone. name: of DECODERS."""
    repository, backbone = DECODERS[name]
    folder = to / "featinv_decoders" / repository.split("/")[1]
    decoder = Need(repository, folder, choose_decoder, [], f"Load Feature Decoder, decoder: {folder.name}")
    return [decoder, _timm_model(backbone, to, [])]


def _backbone(config: TrainConfig, to: Path) -> Need | None:
    name, weights = config.backbone, config.backbone_weights
    if name in BACKBONES or (Path(name) / "config.json").is_file() or (weights and Path(weights).is_file()):
        return None
    return _timm_model(name, to, ["--backbone-weights", "null"] if weights else [])


def _timm_model(name: str, to: Path, use: list[str]) -> Need:
    """use: options beside --backbone. Raises FeatInvError for a name that the hub cannot have."""
    import timm  # takes seconds

    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError:  # the architecture without such a tag
        known = None
    if not (known and known.hf_hub_id):
        near = ", ".join(get_close_matches(name, timm.list_pretrained(), 4, 0.5)) or "none near"
        raise FeatInvError(f"timm knows no weights of the name {name!r} on the hub; similar names: {near}")
    folder = to / "backbones" / f"{known.architecture}.{known.tag}"
    return Need(
        known.hf_hub_id,
        folder,
        _named("config.json", "model.safetensors"),
        ["--backbone", str(folder), *use],
        f"Load Backbone, weights: {folder.name}/model.safetensors",
    )


def _base(name: str, to: Path) -> Need | None:
    if find_world(name) or Path(name).exists():
        return None
    parts = HUB_NAME.fullmatch(name)
    if not parts:
        raise FeatInvError(
            f"base model {name!r} is neither a folder here nor a hub repository; expected owner/name or"
            " owner/name/FILE.safetensors"
        )
    repository, file = parts["repository"], parts["file"]
    if file:
        return Need(
            repository,
            to / "checkpoints",
            _named(file),
            ["--base", str(to / "checkpoints" / file)],
            f"Load Checkpoint: {file}",
        )
    folder = to / "diffusers" / repository.split("/")[1]
    return Need(repository, folder, choose_base, ["--base", str(folder)], f"DiffusersLoader: {folder.name}")


def _named(*required: str) -> Callable[[Collection[str]], dict[str, str]]:
    def choose(names: Collection[str]) -> dict[str, str]:
        missing = [name for name in required if name not in names]
        if missing:
            raise FeatInvError(f"no {', '.join(missing)}")
        return {name: name for name in required}

    return choose


def choose_base(names: Collection[str]) -> dict[str, str]:
    """The files of a diffusers repository that load_base and ComfyUI read: name there -> name here.

    One weights file for each part: float32 before float16, then .safetensors before .bin. Half precision loses the
    .fp16 in its name, under which both look for it. Raises FeatInvError that names what is missing.
    """
    chosen = {
        name: name
        for name in names
        if name == "model_index.json" or name.rpartition("/")[0] in ("scheduler", "tokenizer")
    }
    missing = [
        name
        for name in ("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
        if name not in chosen
    ]
    for part in MODEL_PARTS:
        safe, pickled = ("model", "pytorch_model") if part == "text_encoder" else ("diffusion_pytorch_model",) * 2
        options = [
            f"{part}/{file}"
            for file in (f"{safe}.safetensors", f"{pickled}.bin", f"{safe}.fp16.safetensors", f"{pickled}.fp16.bin")
        ]
        weights = next((name for name in options if name in names), options[0])
        missing += [name for name in (f"{part}/config.json", weights) if name not in names]
        chosen |= {f"{part}/config.json": f"{part}/config.json", weights: weights.replace(".fp16", "")}
    if missing:
        raise FeatInvError(f"no {', '.join(missing)}; expected Stable Diffusion 1.x in diffusers' layout")
    return chosen


def choose_decoder(names: Collection[str]) -> dict[str, str]:
    """The files of a feature decoder: name there -> name here. One weights file, else the shards with their index.
    Raises FeatInvError that names what is missing."""
    if WHOLE in names or INDEX not in names:
        return _named("config.json", WHOLE)(names)
    shards = [name for name in names if SHARD.fullmatch(name)]
    counts = {SHARD.fullmatch(name)["count"] for name in shards}
    expected = [f"{STEM}-{n + 1:05}-of-{count}.safetensors" for count in counts for n in range(int(count))]
    return _named("config.json", INDEX, *(expected or [WHOLE]))(names)


def bring(need: Need) -> None:
    """Fetches the missing files, and prints a line for each. Never replaces an existing file."""
    print(f"{need.repository} -> {need.folder}", flush=True)
    try:
        repository = Repository(need.repository)
    except Unreachable as error:
        _require_local(need, error)
        print(f"  everything is there; not checked this time: {error}")
        return
    try:
        chosen = need.choose(repository.files)
    except FeatInvError as error:
        raise FeatInvError(f"{need.repository} has {error}") from error
    files = {need.folder / here: repository.files[there] for there, here in chosen.items()}
    missing = {target: file for target, file in files.items() if not file.matches(target)}
    for target in files:
        if target in missing and target.exists():
            raise FeatInvError(
                f"{target} is not the file that {need.repository} has; move it away, or name another folder with --to"
            )
        if target not in missing:
            print(f"  {target.relative_to(need.folder)}: already there")
    _require_space(need.folder, sum(file.size for file in missing.values()))
    for target, file in missing.items():
        repository.fetch(file, target)
        print(f"  {target.relative_to(need.folder)}: fetched, {file.size / 1e6:,.1f} MB, checksum right", flush=True)


def _require_local(need: Need, error: Unreachable) -> None:
    """Raises the error if a file is missing here. A file that is here is whole: it was checked before it got its
    name."""
    try:
        need.choose([file.relative_to(need.folder).as_posix() for file in need.folder.rglob("*") if file.is_file()])
    except FeatInvError as missing:
        raise Unreachable(f"{error} (here: {missing})") from error


def _require_space(folder: Path, size: int) -> None:
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise FeatInvError(
            f"{existing} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed: make room, or name another"
            " folder with --to"
        )


def _bring_inception(to: Path) -> None:
    target = to / "inception" / URL.rpartition("/")[2]
    print(f"{URL} -> {target.parent}", flush=True)
    fetched = fetch_release(URL, target)
    size = f"fetched, {target.stat().st_size / 1e6:,.1f} MB, checksum right"
    print(f"  {target.name}: {size if fetched else 'already there'}")
    print(f"to evaluate: python training/evaluate.py --inception {shlex.quote(str(target))} --model FILE --data FOLDER")


def _bring_decoder(name: str, to: Path) -> None:
    required = decoder_needs(name, to)
    for need in required:
        bring(need)
    decoder, backbone = required
    side = find_decoder(decoder.folder).config.encoder_input_size
    options = shlex.join(["--decoder", str(decoder.folder), *backbone.use])
    print(f"to invert an image: python training/reconstruct.py {options} --image FILE --out DIR")
    print(
        "in ComfyUI, where this is its models folder:",
        f"  {backbone.node}, input_size: {side}",
        f"  {decoder.node}",
        sep="\n",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help=(
            f"YAML file, or one of {', '.join(sorted(f.stem for f in CONFIGS.glob('*.yaml')))}; or a feature decoder:"
            f" {', '.join(DECODERS)}; or {INCEPTION}, the weights for FID"
        ),
    )
    parser.add_argument(
        "--to",
        type=Path,
        default=ROOT / "models",
        metavar="DIR",
        help="models folder (run.py names that of the ComfyUI checkout it finds)",
    )
    parser.add_argument("--base", metavar="REPOSITORY", help="base model to fetch instead of the configuration's")
    args = parser.parse_args(arguments)
    if args.config == INCEPTION:
        return _bring_inception(args.to.absolute())
    if args.config in DECODERS:
        return _bring_decoder(args.config, args.to.absolute())
    file = Path(args.config)
    if not file.is_file() and file.name == args.config:
        file = CONFIGS / f"{args.config.removesuffix('.yaml')}.yaml"
    required = needs(read_config(file, {"base": args.base} if args.base else None), args.to.absolute())
    if not required:
        print(f"{file.stem} needs no files: its backbone and its base model are embedded or here already")
        return
    for need in required:
        bring(need)
    options = [option for need in required for option in need.use]
    if options:
        print(f"to train: accelerate launch training/train.py --config {shlex.join([str(file), *options])}")
    print("in ComfyUI, where this is its models folder:", *(f"  {need.node}" for need in required), sep="\n")


if __name__ == "__main__":
    try:
        main()
    except FeatInvError as error:
        print(f"download.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("download.py: interrupted; the same command goes on where it stopped")
