"""Adds scope statistics to the weights file at the end of a run, if the configuration says so."""

from __future__ import annotations

from pathlib import Path

import torch

from featinv_nodes.core.errors import FeatInvError
from featinv_nodes.core.weights import save_scope
from featinv_nodes.worlds import drawing_world

from ..config import TrainConfig
from ..data import scope
from ..data.listing import open_listing
from ..models.pipeline import load_pipeline


def check_scope_data(config: TrainConfig, write: bool = True) -> None:
    """Raises FeatInvError if the pictures for end_with_scope are not there, or too few; before a long training. write:
    as in TarShards."""
    if (
        config.scope
        and config.scope_data
        and not drawing_world(config.scope_data)
        and (there := len(open_listing(config.scope_data, None, write).names)) < config.scope
    ):
        raise FeatInvError(
            f"scope_data {config.scope_data} holds {there} images; asked for {config.scope}: give a folder with more,"
            " or a smaller --scope"
        )


def end_with_scope(file: Path, config: TrainConfig, device: torch.device | str) -> None:
    """What train.py ends with: the statistics that a configuration asks for, written into its weights file."""
    data = config.scope_data or config.data
    pipeline = load_pipeline(str(file), config.base, config.backbone_weights, config.backbone, str(device))
    save_scope(
        file,
        scope.fit(
            pipeline,
            pipeline.recommended(gradient=0.0),
            data,
            config.scope,
            min(scope.DRAWN, config.scope),
            scope.centres_for(data),
        ),
    )
