"""What goes wrong without ending a run: images that cannot be read, steps whose gradients are not finite."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from featinv_nodes.core.errors import FeatInvError

from ..config import TrainConfig
from ..data.loader import Photographs, Scenes
from ..files import write_json, write_text

NAMED = 10  # pictures that a process names as it meets them
ROW = 20  # steps in a row, not finite, that end a run which leaves such steps out


class FaultTracker:
    """pictures: name -> reason of those that were replaced, of this process; steps: first image numbers of the steps
    that were left out. Both are part of a checkpoint."""

    def __init__(
        self, accelerator: Accelerator, output: Path, config: TrainConfig, source: Scenes | Photographs, per_step: int
    ) -> None:
        self.accelerator, self.output, self.config, self.source, self.per_step = (
            accelerator,
            output,
            config,
            source,
            per_step,
        )
        self.pictures: dict[str, str] = {}
        self.steps: list[int] = []

    def unread(self, skipped: list[tuple[str, str]]) -> None:
        """Counts pictures that the data replaced, and names the first ones."""
        for name, reason in skipped:
            if name not in self.pictures and len(self.pictures) < NAMED:
                tqdm.write(f"{name} cannot be read and is replaced ({reason})")
            self.pictures[name] = reason

    def check(self, losses: list[Tensor], images_seen: int, signal: int = 0) -> tuple[list[float], int]:
        """The last losses as numbers, means over the processes, and the largest signal that any of them got; here the
        device is waited for.

        losses: of the steps up to `images_seen`, NaN where the step was left out. Raises FeatInvError for such a step
        if config.nan is "stop", and for ROW in a row in any case; a file then says which images they were.
        """
        values = self.accelerator.reduce(torch.stack(losses), "mean").tolist() if losses else []
        signals = self.accelerator.gather(torch.tensor([signal], device=self.accelerator.device))
        starts = [images_seen - (len(values) - k) * self.per_step for k in range(len(values))]
        bad = [start for start, value in zip(starts, values) if not math.isfinite(value) and start not in self.steps]
        self.steps += bad
        if bad and self.config.nan == "stop":
            raise self._explain(bad[0], "")
        for start in bad:
            if (row := self.row(start + self.per_step)) >= ROW:
                raise self._explain(start - (row - 1) * self.per_step, f", and in {row - 1} more after it")
        if bad and self.accelerator.is_main_process:
            tqdm.write(
                f"left out: the steps from image {', '.join(map(str, bad))} on, whose loss or gradients are not finite"
            )
        return values, int(signals.max())

    def row(self, images_seen: int) -> int:
        """How many steps in a row were left out up to `images_seen`."""
        left_out, count = set(self.steps), 0
        while images_seen - (count + 1) * self.per_step in left_out:
            count += 1
        return count

    def _explain(self, first: int, more: str) -> FeatInvError:
        file, numbers = self.output / f"not_finite_{first:012d}.json", range(first, first + self.per_step)
        if self.accelerator.is_main_process:
            names = [self.source.name(self.source.entry(number)[0]) for number in numbers]
            write_json(
                file, {"first_image": first, "images": self.per_step, "pictures": names, "config": asdict(self.config)}
            )
        return FeatInvError(
            f"the loss or its gradients are not finite in the step from image {first} on{more} (its images and the"
            f" configuration: {file}). The last checkpoint is from before it. Continue"
            f" with a lower --lr{'' if more else ', with --nan skip, which skips such steps,'} or with --precision fp32"
        )

    def state(self) -> dict:
        """For the checkpoint, of all processes; every process calls this. Writes the list of pictures."""
        gathered = gather_object([self.pictures])
        pictures = {name: reason for part in gathered for name, reason in part.items()}
        if pictures and self.accelerator.is_main_process:
            try:
                write_text(
                    self.output / "unreadable.txt",
                    "".join(f"{name}\t{reason}\n" for name, reason in sorted(pictures.items())),
                )
            except OSError as error:
                tqdm.write(f"unreadable.txt was not written: {error}")
        return {"pictures": pictures, "steps": self.steps}

    def restore(self, state: dict) -> None:
        self.pictures, self.steps = dict(state["pictures"]), list(state["steps"])

    def summary(self) -> str:
        """What to say at the end, empty if nothing happened."""
        lines = []
        if self.pictures:
            some = ", ".join(sorted(self.pictures)[:NAMED])
            lines.append(
                f"{len(self.pictures)} images could not be read and were replaced ({some}; all in"
                f" {self.output / 'unreadable.txt'})"
            )
        if self.steps:
            lines.append(
                f"{len(self.steps)} steps were left out, not finite, from image"
                f" {', '.join(map(str, self.steps[:NAMED]))} on"
            )
        return "\n".join(lines)
