"""The training loop, and a check of what it would do."""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ..config import TrainConfig
from .folder import only_run_in
from .interrupts import Interrupts
from .opening import time_left
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


def check(config: TrainConfig, output: Path) -> None:
    """Opens everything that a run opens, takes two steps, times the second, and prints a run's first lines.
    Writes nothing. Raises FeatInvError if the configuration cannot be trained."""
    with ExitStack() as stack:
        run = Run(config, output, stack, write=False)
        if run.images_seen >= config.max_images:
            return
        began = 0.0
        for _ in range(2):  # the first one compiles and warms up
            began = time.perf_counter()
            run.step()
            run.next_batch(at_end=True)
            loss = run.losses[-1].item()  # waits for the device
        taken = time.perf_counter() - began
        run.images_seen -= 2 * run.per_step
        run.say(time_left(run, run.per_step / taken))
        run.say(
            f"checked: nothing was written{'' if math.isfinite(loss) else ', but the loss of a step is not finite'}"
        )
