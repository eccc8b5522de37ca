"""FSDP: a network divided among processes trains, is saved and resumed as a whole one."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from processes import side_by_side
from safetensors.torch import load_file

from diffusers_sde import SDEPipeline
from diffusers_sde.images.loading import load_digits
from diffusers_sde.training import Trainer, TrainingConfig

OPTIONS = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "lr_warmup_steps": 0,
    "learning_rate": 1e-3,
    "dropout": 0.0,
    "sample_every": 2,
    "num_sample_images": 2,
    "num_inference_steps": 2,
    "eval_every": 2,
    "num_eval_images": 5,
    "eval_features": "pixels",
    "logger": "none",
    "mixed_precision": "no",
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D",
}


def trainer(output_dir, **options):
    return Trainer(TrainingConfig(output_dir=str(output_dir), **(OPTIONS | options)), load_digits().select(range(30)))


def shard_on_the_cpu():
    """Let accelerate choose FSDP for processes without GPUs, which torch can shard and accelerate declines to."""
    plain = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        first = not AcceleratorState._shared_state
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if first and fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train_sharded(folder, rank):
    """One of two processes: an uninterrupted run, one that goes on from its middle, and a step in bf16."""
    os.environ |= {**FSDP, "FORK_LAUNCHED": "1"}  # the latter for one process group for all runs
    shard_on_the_cpu()

    def begin(name, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        return trainer(folder / name, **options)

    run = begin("run")
    pipeline = run.run()
    held = sum(parameter.to_local().numel() for parameter in run.network.parameters())
    torch.save(pipeline.unet.state_dict(), folder / f"returned-{rank}.pt")
    if rank == 0:
        shutil.copytree(folder / "run" / "checkpoint-2", folder / "resumed" / "checkpoint-2")
    torch.distributed.barrier()
    begin("resumed", resume_from_checkpoint="latest").run()

    options = {"channels_last": True, "ema_relative_std": 0.1, "sample_every": 0, "eval_every": 0}
    run, seen = begin("bf16", mixed_precision="bf16", max_train_steps=1, **options), {}
    run.network.register_forward_pre_hook(lambda _, inputs: seen.update(timestep=str(inputs[1].dtype)))
    run.network.mid_block.resnets[0].conv1.register_forward_hook(
        lambda module, inputs, output: seen.update(
            weight=str(module.weight.dtype),
            output=str(output.dtype),
            channels_last=output.is_contiguous(memory_format=torch.channels_last),
        )
    )
    run.run()
    (folder / f"seen-{rank}.json").write_text(json.dumps({"held": held, **seen}))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The folder of what two processes have trained."""
    if not hasattr(Accelerator, "is_fsdp2"):
        pytest.skip("accelerate < 1.6 has no FSDP 2")
    folder = tmp_path_factory.mktemp("sharded")
    assert side_by_side(train_sharded, folder, timeout=240) == [0, 0]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    trainer(folder, train_batch_size=4).run()
    return folder


def state(folder, step=4):
    """Everything of a checkpoint that has shards, by its kind."""
    network, average = (load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors") for name in ("model", "ema"))
    optimizer = torch.load(folder / f"checkpoint-{step}" / "optimizer.bin", weights_only=True)["state"]
    moments = {name: [values[name] for values in optimizer.values()] for name in ("step", "exp_avg", "exp_avg_sq")}
    tensors = {"network": list(network.values()), "average": [average[str(i)] for i in range(len(average))], **moments}
    return {kind: torch.cat([value.flatten() for value in values]) for kind, values in tensors.items()}


def assert_same_run(one, other, before):
    """To round-off, beside how far the run has moved."""
    for kind, value in one.items():
        assert (value - other[kind]).norm() <= 1e-3 * (value - before[kind]).norm(), kind


def test_shards_train_like_the_whole_network(sharded, alone):
    assert_same_run(state(alone), state(sharded / "run"), state(alone, 2))
    held = [json.loads((sharded / f"seen-{rank}.json").read_text())["held"] for rank in range(2)]
    total = len(state(alone)["network"])
    assert sum(held) == total and max(held) < 0.6 * total


def test_a_resumed_sharded_run_is_the_uninterrupted_one_bit_for_bit(sharded):
    whole, resumed = state(sharded / "run"), state(sharded / "resumed")
    assert all(torch.equal(whole[kind], resumed[kind]) for kind in whole)


def test_one_process_goes_on_with_what_two_have_sharded(sharded, alone, tmp_path):
    shutil.copytree(sharded / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer(tmp_path, train_batch_size=4, resume_from_checkpoint="latest").run()
    assert_same_run(state(alone), state(tmp_path), state(alone, 2))


def test_the_pipeline_of_shards_is_a_plain_one(sharded, alone):
    pipeline = SDEPipeline.from_pretrained(sharded / "run")
    saved = torch.cat([parameter.detach().flatten() for parameter in pipeline.unet.parameters()])
    assert torch.equal(saved, state(sharded / "run")["average"])
    for rank in range(2):
        returned = torch.load(sharded / f"returned-{rank}.pt", weights_only=True)
        assert all(torch.equal(value, returned[name]) for name, value in pipeline.unet.state_dict().items())
    for step in (2, 4):
        a, b = (
            np.asarray(Image.open(run / "samples" / f"step-000000{step}.png"), dtype=int)
            for run in (sharded / "run", alone)
        )
        assert abs(a - b).max() <= 1 and a.std() > 10


def test_shards_compute_in_bfloat16_and_channels_last_but_see_exact_times(sharded):
    seen = json.loads((sharded / "seen-1.json").read_text())
    precision = {"timestep": "torch.float32", "weight": "torch.bfloat16", "output": "torch.bfloat16"}
    assert {**seen, **precision, "channels_last": True} == seen
    assert state(sharded / "bf16", 1)["network"].dtype == torch.float32


@pytest.mark.parametrize(("kind", "name"), [(DistributedType.FSDP, "FSDP 1"), (DistributedType.DEEPSPEED, "DeepSpeed")])
def test_other_ways_of_sharding_are_refused(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: kind))
    with pytest.raises(ValueError, match=f"launched with {name}.*use FSDP 2.*or DDP"):
        trainer(tmp_path)


def test_fsdp_that_accelerate_does_not_choose_is_reported(tmp_path, monkeypatch, caplog):
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    assert trainer(tmp_path).accelerator.distributed_type == DistributedType.NO
    assert caplog.text.count("FSDP was asked for, but accelerate shards on several GPUs") == 1
