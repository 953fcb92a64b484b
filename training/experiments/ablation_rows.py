"""The rows of the ablations: a recipe, and one change after the other to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.sampling import PAPER_SAMPLING, Sampling

from ..config import CONFIGS, TrainConfig, read_config

#: what all trainings share beside the images: they can be compared, and their speed is not of interest
SHARED = {"seed": "1", "compile": "true", "save_every": "12800", "panel_every": "12800", "scope": "0"}
PAPER = {
    "standardise": "false",
    "cycle": "0",
    "batch": "8",
    "schedule": "constant",
    "ema": "0",
    "lr": "1e-5",
    "warmup": "0",
    "recommended": str(PAPER_SAMPLING),
}
RECOMMENDED = "gradient"  # the row that is set beside the paper's
#: its sampling, for other weights; chosen on scenes that are not measured
GUIDED = {"negative": "features", "guidance": 2.0, "steps": 20, "gradient": 0.1}


@dataclass(frozen=True)
class Row:
    """change: in words. base: the row it builds on, None for the first. config: fields of the configuration that it
    changes; sampling: settings that it changes. weights: the shipped model that it draws with. A row without config and
    weights draws with its base's."""

    name: str
    change: str
    base: str | None
    config: dict[str, str] = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)
    weights: str = ""


def drawn_rows(images: int) -> dict[str, Row]:
    """name -> row, each after the one it builds on."""
    rows = [
        Row("paper_1e-5", "the paper's recipe: batch 8, rate 1e-5", None, PAPER),
        Row("paper_1e-4", "rate 1e-4", "paper_1e-5", {"lr": "1e-4"}),
        Row("paper_3e-4", "rate 3e-4", "paper_1e-5", {"lr": "3e-4"}),
        Row("paper_1e-3", "rate 1e-3", "paper_1e-5", {"lr": "1e-3"}),
        Row(
            "batch",
            "batch 64, rate 1.5e-3 after a warm-up, falling to 0",
            "paper_1e-5",
            {"batch": "64", "lr": "1.5e-3", "schedule": "cosine", "warmup": "1000"},
        ),
        Row("ema", "moving average, 0.999 a step", "batch", {"ema": "0.999"}),
        Row("standardise", "features standardised per channel", "ema", {"standardise": "true"}),
        Row("min_snr", "min-SNR weighting, gamma 5", "standardise", {"min_snr": "5"}),
        Row("small", "images of 32 pixels, maps of 4 x 4", "standardise", {"input_size": "32"}),
        Row("small_at_map", "convolutions before the upsampling", "small", {"encoder": "conv_at_map"}),
        Row("batch_16", "batch 16, rate 8e-4", "standardise", {"batch": "16", "lr": "8e-4"}),
        Row("batch_8", "batch 8, rate 5e-4", "standardise", {"batch": "8", "lr": "5e-4"}),
        Row("cycle", "cycle consistency, weight 2", "batch_16", {"cycle": "2.0"}),
        Row("cycle_200", "at timesteps below 200 only", "cycle", {"cycle_below": "200"}),
        Row("cycle_late", "in the last quarter only", "cycle", {"cycle_after": str(images * 3 // 4)}),
        Row("null", "guidance away from zero features, same scale", "batch_8", sampling={"negative": "features"}),
        Row("null_2", "scale 2", "null", sampling={"guidance": 2.0}),
        Row("steps_20", "20 steps instead of 50", "null_2", sampling={"steps": 20}),
        Row("dpmpp_2m", "DPM-Solver++ 2M instead of DDIM", "steps_20", sampling={"solver": "dpmpp_2m"}),
        Row("unipc", "UniPC instead of DDIM", "steps_20", sampling={"solver": "unipc"}),
        Row("text_1", "the text's own guidance scale, 1", "steps_20", sampling={"text_guidance": 1.0}),
        Row("best_of_4", "the best of 4 by cosine", "steps_20", sampling={"best_of": 4}),
        Row("gradient", "gradient guidance in the last 10 steps", "steps_20", sampling={"gradient": 0.1}),
        Row("paper_guided", "sampled as in the row gradient", "paper_3e-4", sampling=GUIDED),
        Row("cycle_guided", "sampled as in the row gradient", "cycle", sampling=GUIDED),
    ]
    return {row.name: row for row in rows}


def photo_rows(images: int) -> dict[str, Row]:
    """The main rows on photographs: what training changes from few images on, sampling with the shipped weights."""
    rows = [
        Row(
            "plain",
            "features as they are, no cycle consistency",
            None,
            {"standardise": "false", "cycle": "0", "recommended": str(PAPER_SAMPLING)},
        ),
        Row("standardise", "features standardised per channel", "plain", {"standardise": "true"}),
        Row("cycle", "cycle consistency, weight 0.5, timesteps below 500", "standardise", {"cycle": "0.5"}),
        Row("shipped", "the shipped weights, sampled as in the paper", None, weights="photo_lite0_blocks4"),
        Row("null", "guidance away from zero features, same scale", "shipped", sampling={"negative": "features"}),
        Row("null_3", "scale 3", "null", sampling={"guidance": 3.0}),
        Row("steps_10", "10 steps instead of 50", "null_3", sampling={"steps": 10}),
        Row("dpmpp_2m", "DPM-Solver++ 2M instead of DDIM", "steps_10", sampling={"solver": "dpmpp_2m"}),
        Row(
            "gradient",
            "gradient guidance in the last 5 steps",
            "steps_10",
            sampling={"gradient": 0.06, "gradient_steps": 5},
        ),
    ]
    return {row.name: row for row in rows}


@dataclass(frozen=True)
class Ablation:
    """config: file name in training/configs, whose model all rows train. layer: of the cosine. own, independent: the
    inverted backbone and the one that took no part. shared: fields that all trainings replace. count: held-out
    pictures.
    """

    rows: Callable[[int], dict[str, Row]]
    config: str
    layer: str
    own: str
    independent: str
    shared: dict[str, str]
    images: int
    count: int


ABLATIONS = {
    "drawn": Ablation(drawn_rows, "tiny_cnn_last.yaml", LAST, "tiny-cnn", "tiny-vit", SHARED, 51_200, 500),
    "photo": Ablation(
        photo_rows,
        "photo_lite0_blocks4.yaml",
        "blocks.4",
        "tf_efficientnet_lite0.in1k",
        "tf_efficientnet_lite2.in1k",
        SHARED | {"compile": "false"},
        6_400,
        64,
    ),
}


def chosen_rows(rows: dict[str, Row], names: list[str]) -> list[Row]:
    """The named rows in the table's order, all without names. Raises FeatInvError for others."""
    unknown = [name for name in names if name not in rows]
    if unknown:
        raise FeatInvError(f"--rows {' '.join(unknown)}: expected some of {', '.join(rows)}")
    return [row for row in rows.values() if row.name in (names or rows)]


def chain(rows: dict[str, Row], row: Row) -> list[Row]:
    """The rows that a row builds on and itself, the first one first."""
    return [*(chain(rows, rows[row.base]) if row.base else []), row]


def weights_of(rows: dict[str, Row], row: Row) -> Row:
    """The row whose weights a row draws with: its own, or those of the nearest row below that was trained."""
    return next(other for other in reversed(chain(rows, row)) if other.config or other.weights)


def config_of(ablation: Ablation, rows: dict[str, Row], row: Row, images: int, data: str | None = None) -> TrainConfig:
    """How a row's weights are trained. data: folder of the pictures, where that is not the configuration's."""
    changes = {name: value for other in chain(rows, row) for name, value in other.config.items()}
    own = ablation.shared | {"max_images": str(images)} | ({"data": data} if data else {})
    return read_config(CONFIGS / ablation.config, own | changes)


def sampling_of(rows: dict[str, Row], row: Row) -> Sampling:
    """How a row's pictures are drawn: by the paper's settings but for what the rows up to it change."""
    changes = {name: value for other in chain(rows, row) for name, value in other.sampling.items()}
    return Sampling(**(PAPER_SAMPLING | changes))
