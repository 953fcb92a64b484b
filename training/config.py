"""The training configuration: a YAML file, any field overridden on the command line."""

from __future__ import annotations

import argparse
import math
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from featinv_nodes.core.encoders import KINDS
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import PAPER_SAMPLING, Sampling
from featinv_nodes.core.scope import FEWEST
from featinv_nodes.worlds import drawing_world

from .files import write_text

CONFIGS = Path(__file__).parent / "configs"
DEFAULT = CONFIGS / "tiny_cnn_last.yaml"
STREAM = "stream:"  # how data begins that is read as it comes
#: fields that a run cannot change when it goes on
MODEL_FIELDS = (
    "backbone",
    "input_size",
    "layer",
    "pooled",
    "base",
    "prompt",
    "encoder",
    "encoder_width",
    "standardise",
    "optimizer",
)
CHOICES = {
    "encoder": tuple(KINDS),
    "schedule": ("constant", "cosine"),
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "flips": ("none", "horizontal", "both"),
    "optimizer": ("adamw", "adamw8bit"),
    "nan": ("stop", "skip"),
}
#: least and largest values
RANGES = {
    **dict.fromkeys(
        (
            "batch",
            "accumulate",
            "keep",
            "panel_every",
            "save_every",
            "max_images",
            "images",
            "input_size",
            "encoder_width",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            "lr",
            "warmup",
            "weight_decay",
            "cycle",
            "cycle_after",
            "min_snr",
            "encoder_first",
            "workers",
            "views",
            "seed",
        ),
        (0, math.inf),
    ),
    "dropout": (0, 1),
    "ema": (0, 0.999999),
    "cycle_below": (1, 1000),
    "seed": (0, 2**32 - 1),
}


def option(help: str, default: object = MISSING) -> Any:
    """A field, of whatever type its annotation says, with its line in --help."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """Everything that decides a run. Counts are in images unless said otherwise. Each field is an option of
    train.py."""

    name: str = option("name of the run and of its weights file")
    backbone: str = option(
        'network to invert: an embedded one ("tiny-cnn"), a timm name, a timm-hub folder, or module:FILE.py:NAME'
    )
    base: str = option(
        "base model: an embedded world's (tiny or photo), a diffusers folder, a file of Stable Diffusion 1.x, or"
        " owner/name in the hub's cache"
    )
    data: str = option(
        'images: "drawn", a folder of images or of plain tar files (webdataset), hf:NAME[:SPLIT[:COLUMN]] for a'
        " downloaded Hugging Face data set (a name, or a folder of save_to_disk; COLUMN chooses among several columns"
        " of images), or stream:NAME[:SPLIT[:COLUMN]] for one that is read as a stream"
    )
    prompt: str = option("text of the positive prompt")
    max_images: int = option("images after which the run ends")
    backbone_weights: str | None = option("the backbone's .safetensors file", None)
    input_size: int | None = option("side of the backbone's input in pixels, if not timm's default", None)
    layer: str = option("layer to invert: last, or a name from timm's feature_info", "last")
    pooled: bool = option("invert the mean over the layer's locations", False)
    encoder: str = option("conditional encoder: conv (the paper), conv_at_map (upsamples last) or perceiver", "conv")
    encoder_width: int = option("hidden channels of the encoder (the paper: 512)", 512)
    standardise: bool = option("standardise each channel by its mean and deviation over the first 256 images", False)
    dropout: float = option("share of the samples that lose features and text together", 0.15)
    cycle: float = option(
        "weight of cycle consistency, 1 - cos of the features of the predicted image; 0 for none (the paper)", 0.0
    )
    cycle_below: int = option("cycle consistency acts below this timestep of the base model's 1000", 1000)
    cycle_after: int = option("cycle consistency acts (and costs time) after this many images, as in ControlNet++", 0)
    batch: int = option("images per process and pass", 8)
    lr: float = option("learning rate of AdamW", 1e-5)
    schedule: str = option("learning rate after the warm-up: constant (the paper), or cosine to zero", "constant")
    warmup: int = option("images in which the learning rate grows from zero", 1000)
    weight_decay: float = option("weight decay of AdamW", 0.01)
    ema: float = option("decay per step of the moving average of the weights, which is then saved; 0 for none", 0.0)
    min_snr: float = option(
        "gamma of the min-SNR weighting of timesteps (Hang et al. 2023: 5), 0 for none (the paper)", 0.0
    )
    accumulate: int = option("passes per step: a step takes batch x accumulate x processes images", 1)
    checkpointing: bool = option("compute activations again for the gradient: saves memory, costs time", False)
    optimizer: str = option(
        "adamw, or adamw8bit, whose moments take a quarter of the memory (needs bitsandbytes)", "adamw"
    )
    nan: str = option("what to do at a step whose loss or gradients are not finite: stop or skip", "stop")
    precision: str = option(
        "fp32, bf16 (also for the frozen weights), fp16, or auto: bf16 if the device computes in it, else fp32",
        "auto",
    )
    compile: bool = option("use torch.compile: takes a minute, minutes for large models; pays off in long runs", False)
    graph: bool = option("run the whole step as one CUDA graph, for small models on one GPU", False)
    init_from: str | None = option(
        "weights file to start from: its ControlNet, and its encoder if it inverts the same features", None
    )
    encoder_first: int = option("train only the encoder for this many images", 0)
    workers: int = option("data loading processes", 0)
    images: int | None = option("use only this many of the images, evenly spread", None)
    views: int = option("crops and flips of each image, used in turn, one per epoch; 0 for a new one each time", 0)
    cache: str | None = option("folder of latents that training/cache.py wrote for these views", None)
    cache_features: bool = option("also cache the features", False)
    flips: str = option("random flips of the crops: none, horizontal or both", "none")
    seed: int = option("seed of all random numbers", 0)
    panel_every: int = option("images between sample panels", 20_000)
    save_every: int = option("images between checkpoints", 10_000)
    keep: int = option("checkpoints kept", 2)
    trackers: list = option("accelerate's trackers, such as [tensorboard]", [])
    recommended: dict = option("sampling settings written into the weights file", PAPER_SAMPLING)
    scope: int = option("images for the scope statistics that are fitted at the end (see fit_scope.py), 0 for none", 0)
    scope_data: str | None = option("folder of these images, which training does not see", None)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise FeatInvError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name, (least, most) in RANGES.items():
            if (value := getattr(self, name)) is not None and not least <= value <= most:
                raise FeatInvError(
                    f"{name} {value}: expected {f'at least {least}' if most == math.inf else f'{least} to {most}'}"
                )
        if not self.name.strip(".") or {"/", "\\"} & set(self.name):
            raise FeatInvError(f"name {self.name!r}: expected a file's name, without folders")
        try:
            Sampling(**self.recommended)
        except TypeError as error:
            raise FeatInvError(f"recommended {self.recommended}: {error}") from error
        if self.data.startswith(STREAM) and (self.cache or self.views or self.images):
            raise FeatInvError(
                f"data {self.data}: the images of a stream cannot be counted or cached; leave out --cache, --views"
                " and --images"
            )
        if self.cache and not self.views and not drawing_world(self.data):
            raise FeatInvError("a cache holds a fixed number of views of each image; state it with --views")
        if self.cache_features and not self.cache:
            raise FeatInvError("cache_features: name the folder of the cache with --cache DIR")
        if self.cycle_after and not self.cycle:
            raise FeatInvError(
                f"cycle_after {self.cycle_after}: without --cycle there is no cycle consistency; give --cycle too"
            )
        if self.cycle_after and self.graph:
            raise FeatInvError(
                f"cycle_after {self.cycle_after}: with one CUDA graph every step computes the same; leave out --graph"
                " or --cycle-after"
            )
        if self.graph and (self.precision == "fp16" or self.optimizer != "adamw"):
            raise FeatInvError(
                f"graph with precision {self.precision} and optimizer {self.optimizer}: a CUDA graph cannot wait for"
                " the device, as loss scaling in fp16 and other optimizers do; take bf16 and adamw or leave out --graph"
            )
        if self.encoder_first and not self.init_from:
            raise FeatInvError(
                f"encoder_first {self.encoder_first}: without --init-from the ControlNet starts with zero output, so"
                " that the encoder alone learns nothing; give --init-from, or leave out --encoder-first"
            )
        if self.scope and self.scope < 2 * FEWEST:
            raise FeatInvError(f"scope {self.scope}: expected 0 or at least {2 * FEWEST}")
        if self.scope and not self.scope_data and not drawing_world(self.data):
            raise FeatInvError(f"scope {self.scope}: name images that training does not see with --scope-data FOLDER")

    @property
    def mixed_precision(self) -> str:
        """`precision` as accelerate names it."""
        return {"fp32": "no"}.get(self.precision, self.precision)

    def check_folder(self, file: Path) -> dict:
        """The configuration that stands in `file` beside a run's results; {} where there is none. Raises FeatInvError
        if it belongs to a run of another model or optimizer, or is damaged."""
        if not file.exists():
            return {}
        try:
            old, new = yaml.safe_load(file.read_text(encoding="utf-8")), asdict(self)
        except (yaml.YAMLError, UnicodeDecodeError):
            old = None
        if not isinstance(old, dict):
            raise FeatInvError(f"{file} is damaged: remove it to go on with this configuration")
        differing = [
            f"{name}: {old.get(name)} there, {new[name]} now" for name in MODEL_FIELDS if old.get(name) != new[name]
        ]
        if differing:
            raise FeatInvError(f"{file.parent} holds another run ({'; '.join(differing)}); choose another --output")
        return old

    def save(self, file: Path) -> None:
        """Writes the configuration beside its results, or raises as check_folder does."""
        self.check_folder(file)
        write_text(file, yaml.safe_dump(asdict(self), sort_keys=False))


def read_config(file: Path, overrides: dict[str, str] | None = None) -> TrainConfig:
    """A YAML file, over those it names under `extends`, with fields replaced by YAML texts. Raises FeatInvError for
    unknown or missing fields and for values of the wrong type."""
    if not file.is_file():
        raise FeatInvError(
            f"configuration {file} does not exist; shipped: {', '.join(sorted(f.name for f in CONFIGS.glob('*.yaml')))}"
        )
    known = {f.name: f for f in fields(TrainConfig)}
    values = _values(file) | {
        name: _parsed(text, str(known[name].type) if name in known else "") for name, text in (overrides or {}).items()
    }
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise FeatInvError(f"{file}: unknown fields {unknown}; known: {', '.join(known)}")
    for name, value in values.items():
        values[name] = _typed(None if name in (overrides or {}) else file, name, value, str(known[name].type))
    try:
        return TrainConfig(**values)
    except TypeError as error:
        raise FeatInvError(f"{file}: {error}") from error


def _values(file: Path, extending: tuple[Path, ...] = ()) -> dict:
    """A YAML file's fields over those of the files that it extends, the last named first. extending: the files that
    led to this one."""
    if file.resolve() in extending:
        raise FeatInvError(f"{file} extends itself, through {', '.join(f.name for f in extending)}")
    try:
        own = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FeatInvError(f"{file} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise FeatInvError(f"{file} holds no fields; expected lines such as `batch: 8`")
    parents = own.pop("extends", [])
    values = {}
    for name in parents if isinstance(parents, list) else [parents]:
        if not (file.parent / str(name)).is_file():
            raise FeatInvError(f"{file} extends {name}, which does not exist beside it")
        values |= _values(file.parent / str(name), (*extending, file.resolve()))
    return values | own


def _parsed(text: str, expected: str) -> object:
    """An override's text as YAML; what is to be text stays as it is, whatever else YAML might take it for."""
    words = expected.split(" | ")
    if "str" not in words:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text  # of the wrong type, then
    return None if "None" in words and text.lower() in ("", "~", "null", "none") else text


def _typed(file: Path | None, name: str, value: object, expected: str) -> object:
    """The value if it is of the wanted type (a dataclass annotation), numbers for floats converted. file: where it
    stands, None for the command line."""
    try:
        if expected == "float" and not isinstance(value, bool):
            return float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        pass
    if type(value).__name__ in expected or (value is None and "None" in expected):
        return value
    raise FeatInvError(
        f"{f'{file}: {name}' if file else '--' + name.replace('_', '-')} is {value!r}; expected {expected}"
    )


def run_parser(description: str) -> argparse.ArgumentParser:
    """The options --config FILE, --output DIR and --FIELD VALUE for every field."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=DEFAULT, help="YAML file (default: the drawn world's CNN)")
    parser.add_argument("--output", type=Path, help="folder of the run (default: out/train/NAME)")
    add_fields(parser)
    return parser


def chosen(args: argparse.Namespace) -> tuple[TrainConfig, Path]:
    """The configuration and the run's folder that arguments of run_parser name."""
    config = read_config(args.config, given_fields(args))
    return config, args.output or Path("out/train") / config.name


def parse_arguments(description: str) -> tuple[TrainConfig, Path]:
    """Command line of the options of run_parser."""
    return chosen(run_parser(description).parse_args())


def add_fields(parser: argparse.ArgumentParser) -> None:
    """An option for every field of the configuration, each with its help."""
    group = parser.add_argument_group(
        "fields of the configuration, which replace the file's", "Defaults hold where the file has no such field."
    )
    for f in fields(TrainConfig):
        unset = "" if f.default in (MISSING, None) else f" (default: {f.default})"
        names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        group.add_argument(
            *names,
            dest=f.name,
            metavar=str(f.type).removesuffix(" | None").upper(),
            help=(f.metadata["help"] + unset).replace("%", "%%"),
        )


def given_fields(args: argparse.Namespace) -> dict[str, str]:
    """Those of add_fields that were given, for read_config."""
    return {f.name: value for f in fields(TrainConfig) if (value := getattr(args, f.name)) is not None}
