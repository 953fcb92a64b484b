"""A training run that ends by SIGKILL at a chosen moment: what test_never_loses_work.py runs in processes of its
own."""

import os
import signal
from pathlib import Path

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from training import checksum
from training.config import CONFIGS, DEFAULT, read_config
from training.loop import checkpoints, log
from training.loop import run as running
from training.loop.ema import update_average
from training.loop.training import train
from training.models import base_model, channels_last
from training.models.controlnet import FeatureControlNet

SMALL = {
    "batch": "2",
    "cycle": "0.0",
    "encoder_width": "16",
    "schedule": "constant",
    "standardise": "false",
    "precision": "fp32",
    "warmup": "0",
    "ema": "0.9",
    "panel_every": "1000",
    "save_every": "6",
    "max_images": "50",
    "keep": "3",
}


def die_at(owner, name, count, after=False):
    """SIGKILL before, or after, the call number `count` of owner.name."""
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def between_steps(folder):
    die_at(running, "set_lr", 8)


def in_the_middle_of_a_checkpoint(folder):
    class Halfway(checksum._Digesting):
        files = 0

        def __init__(self, file):
            super().__init__(file)
            Halfway.files += 1

        def write(self, data):
            written = super().write(data)
            self.file.flush()
            if Halfway.files == 2 and self.file.tell() > 1 << 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return written

    checksum._Digesting = Halfway


def before_a_checkpoint_is_renamed(folder):
    die_at(checksum, "_digest", 3)  # the first was the one to go on from


def before_older_checkpoints_go(folder):
    die_at(checkpoints, "write_checksummed", 2, after=True)


def in_the_middle_of_a_line_of_the_log(folder):
    real = log.json.dumps

    def half(values):
        text = real(values)
        with open(Path(folder) / "stats.jsonl", "a") as opened:
            opened.write(text[: len(text) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    log.json.dumps = half


def before_the_weights_are_written(folder):
    die_at(FeatureControlNet, "save", 1)


def never(folder):
    pass


MOMENTS = (
    between_steps,
    in_the_middle_of_a_checkpoint,
    before_a_checkpoint_is_renamed,
    before_older_checkpoints_go,
    in_the_middle_of_a_line_of_the_log,
    before_the_weights_are_written,
)


def run(folder, moment):
    torch.set_num_threads(1)  # sums are added in one order
    moment(folder)
    train(read_config(DEFAULT, SMALL), Path(folder))


def run_as(rank, processes, port, folder, values):
    """One of several processes, as a launcher starts them."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    train(read_config(DEFAULT, values), Path(folder))


def evaluate_as(rank, port, folder, options):
    """One of two processes of an evaluation in shards of two pictures, which writes down what it records."""
    from training import evaluate
    from training.evaluation import shards

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    shards.SHARD = 2
    torch.set_num_threads(1)
    real = shards.Store.write
    shards.Store.write = lambda self, condition, first, *rest: (
        print(condition, first, file=open(f"{folder}-{rank}", "a")) or real(self, condition, first, *rest)
    )
    evaluate.main([*options, "--out", folder])


def run_shared_out(rank, port, folder, values):
    """One of two processes that train as configs/accelerate/fsdp.yaml has it, which accelerate otherwise keeps to
    GPUs, and with the blocks that a GPU has."""
    for module in (base_model, running):
        module.move = on_a_gpu
    shipped = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp.yaml")).fsdp_config
    shipped["fsdp_transformer_cls_to_wrap"] = shipped[
        "fsdp_transformer_layer_cls_to_wrap"
    ]  # as accelerate's launcher names it
    os.environ |= {
        key.upper(): str(value).lower() if isinstance(value, bool) else str(value) for key, value in shipped.items()
    }
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    real, given = AcceleratorState.__init__, []

    def on_a_processor(self, *args, fsdp_plugin=None, **kwargs):
        real(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        given.extend([fsdp_plugin] if fsdp_plugin else [])
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, given[0]

    AcceleratorState.__init__ = on_a_processor
    run_as(rank, 2, port, folder, values)


def on_a_gpu(model, *args, **kwargs):
    """channels_last.move, as it is for a CUDA device."""
    channels_last.move(model, *args, **kwargs)
    channels_last.keep_channels_last(model)


def learned(place, restored=None):
    """The state of a small model, its optimizer and its average after a step, `place`d first."""
    torch.manual_seed(0)
    model, average = (place(torch.nn.Linear(4, 4)) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if restored:
        checkpoints.restore(restored, model, optimizer, average)
        return checkpoints.gather(model, optimizer, average)
    model(torch.arange(4.0)[None]).square().sum().backward()
    optimizer.step()
    update_average(average, model, 0.5)
    return checkpoints.gather(model, optimizer, average) | {
        "whole": checkpoints.whole(average, lambda: torch.nn.Linear(4, 4)).state_dict()
    }


def shared_out(rank, port, folder):
    """One of two processes that share out the weights; the first writes what they save together."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = distributed.init_device_mesh("cpu", (2,))
    state = learned(lambda module: fully_shard(module, mesh=mesh))
    if rank == 0:
        torch.save(state, folder + "/state.pt")
    distributed.barrier()
    again = learned(lambda module: fully_shard(module, mesh=mesh), torch.load(folder + "/state.pt"))
    for part in ("model", "average"):
        assert all(torch.equal(again[part][k], state[part][k]) for k in state[part])
    distributed.destroy_process_group()
