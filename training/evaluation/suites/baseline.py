"""The base model alone, told each image's class and superclass in words (paper Table 3, class-conditional
baseline)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from featinv_nodes.core.backbones import LAST
from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.metrics import top_k_match
from featinv_nodes.worlds import find_world

from ...models import base_model, parts, stable_diffusion
from ...models.sampling import sample
from ..context import ORIGINAL, ROUND_TRIP, UNCONDITIONAL, EvalContext
from ..evaluator import Columns, without_match
from ..report import Report, by_measure, condition_panel, figures_of
from ..shards import Condition, Table
from ..sources import Originals
from .base import Suite

PROMPT = "a high-quality, detailed, and professional image of a {}, which is a kind of {}"
SUPERCLASSES = Path(__file__).parent / "superclasses.txt"
NAMED = "class name"


class Baseline(Suite):
    """Pictures drawn from the class's name instead of features, measured like reconstructions; and by the class
    itself."""

    name = "baseline"
    chooses = False

    def __init__(self, context: EvalContext, args: argparse.Namespace) -> None:
        super().__init__(context, args)
        self.base = args.base or context.info(self.spec).base["name"]
        if find_world(self.base):
            raise FeatInvError(
                "suite baseline needs a base model that reads text, which the embedded ones do not. Use the"
                " unconditional baseline of suite quality instead"
            )
        self.require_imagenet()
        if reason := without_match(context.backbone(self.spec)):
            raise FeatInvError(f"suite baseline measures the accuracy of a classifier, and {reason}")
        unnamed = [n for n, c in zip(context.source.names, context.source.classes) if c not in context.source.labels]
        if unnamed:
            raise FeatInvError(
                f"suite baseline needs ImageNet's layout, a folder per synset; {len(unnamed)} images have none,"
                f" {unnamed[0]} the first"
            )
        self.tested = self.one_model()
        self.sampling = {NAMED: context.sampling(self.spec), UNCONDITIONAL: context.sampling(self.spec)}
        self.numbers = {name: k for k, name in enumerate(ImageNetInfo().label_names())}
        self._text: dict[str, Tensor] = {}

    def text(self, synset: str) -> Tensor:
        """[1, T, D] the embedding of a class's prompt; those of all classes are made the first time."""
        if not self._text:
            labels, above = self.context.source.labels, superclasses()
            embedded = embeddings(self.base, [PROMPT.format(labels[s].split(",")[0], above[s]) for s in labels])
            self._text = dict(zip(labels, embedded.split(1)))
        return self._text[synset]

    def named(self, originals: Originals) -> Columns:
        """What the base model draws when it is told each picture's class; also whether the backbone finds that class
        in it."""
        pipeline = self.context.open(self.spec)
        base, pixel_values = pipeline.base, originals.preprocess(self.tested.backbone)
        own = torch.cat([self.text(c) for c in originals.classes]).to(base.unet.device)
        known, base.text = base.text, base.text | {NAMED: own}
        latents = sample(base, None, None, self.tested.start(originals), self.sampling[NAMED], NAMED)
        base.text = known
        drawn = base.decode(latents).cpu()
        logits = self.tested.backbone.logits(
            self.tested.backbone.extract(self.tested.backbone.preprocess(drawn, "stretch"), LAST)
        ).cpu()
        target = torch.nn.functional.one_hot(
            torch.tensor([self.numbers[c] for c in originals.classes]), logits.shape[1]
        )
        accuracy = {f"top{k}_accuracy": top_k_match(target, logits, k).float() for k in (1, 5)}
        return self.tested.measure(pixel_values, drawn, originals.single) | accuracy

    def conditions(self) -> dict[str, Condition]:
        return {NAMED: self.named, **self.tested.bounds(self.sampling[UNCONDITIONAL])}

    def report(self, tables: dict[str, Table]) -> Report:
        figures = {
            condition: figures_of(tables[condition], tables[ORIGINAL])
            for condition in (NAMED, UNCONDITIONAL, ROUND_TRIP)
        }
        grid = by_measure("Images generated from the class's name", figures, [UNCONDITIONAL, NAMED, ROUND_TRIP])
        lines = [
            f'Prompt: "{PROMPT.format("CLASS", "SUPERCLASS")}", by WordNet. Paper, Table 3: top-5 (top-1) accuracy 88'
            " to 93 % (65 to 72 %)."
        ]
        return Report(
            self.title(),
            figures,
            [grid],
            lines,
            panels={"panel.png": condition_panel(tables, [ORIGINAL, NAMED, ROUND_TRIP, UNCONDITIONAL], self.title())},
        )


def superclasses() -> dict[str, str]:
    """Synset of ImageNet-1k -> its superclass in WordNet."""
    return dict(
        line.split("\t") for line in SUPERCLASSES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    )


def embeddings(base: str, prompts: list[str]) -> Tensor:
    """[N, T, D] by the base model's own text encoder."""
    if base.endswith((".safetensors", ".ckpt")):
        _, _, _, encoder = stable_diffusion.load_single_file(Path(base))
        tokens = stable_diffusion.Tokens()
    else:
        folder = base_model.find_base(base)
        if not (folder / "text_encoder").is_dir():
            raise FeatInvError(
                f"suite baseline needs the base model's text encoder; {folder} has no folder text_encoder"
            )
        encoder = parts.load_text_encoder(folder / "text_encoder")
        tokens = parts.load_tokenizer(folder / "tokenizer", encoder.config.vocab_size)
    with torch.inference_mode():
        ids = tokens(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.cat([encoder(part)[0] for part in ids.split(64)]).clone()
