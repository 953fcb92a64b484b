"""The training loop."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from ..config import TrainConfig
from .folder import only_run_in
from .interrupts import Interrupts
from .run import Run
from .schedule import due

EVERY = 20  # steps between two lines of stats.jsonl; between them nothing waits for the device


def train(config: TrainConfig, output: Path) -> Path:
    """Trains until config.max_images images are seen and returns the weights file, output/NAME.safetensors.

    Goes on from the newest checkpoint in `output`. SIGTERM and Ctrl-C save first and end the process with status 143 or
    130. Raises FeatInvError for what cannot be trained, and where training cannot go on.
    """
    with only_run_in(output), ExitStack() as stack:
        run = Run(config, output, stack)
        with Interrupts(run.say) as interrupts:
            while run.images_seen < config.max_images:
                run.step()
                run.next_batch()
                done = run.images_seen >= config.max_images
                stop = interrupts.received if run.processes == 1 else 0
                if (full := due(EVERY * run.per_step, run.images_seen, run.per_step)) or done:
                    stop = run.report(interrupts.received, full)
                if due(config.panel_every, run.images_seen, run.per_step):
                    run.draw_panel()
                if due(config.save_every, run.images_seen, run.per_step) or stop or done:
                    with run.pace.elsewhere():
                        run.save(must=bool(stop))
                if stop:
                    run.say(f"stopped at {run.images_seen} images; the same command goes on from there")
                    sys.exit(128 + stop)
        return run.finish()
