"""LoRA adapters: what they compute, what is trained and saved, and that a resumed run is the whole run."""

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from safetensors.torch import load_file
from tiny_networks import tiny_unet
from tiny_parts import pixart
from torch import nn

from diffusers_sde import FlowSDEScheduler, NCSNpp, SDEPipeline, VPSDEScheduler
from diffusers_sde.images.loading import load_digits
from diffusers_sde.networks.denoisers import call_network
from diffusers_sde.training import Trainer, TrainingConfig
from diffusers_sde.training.adapters import (
    AdapterOptions,
    add_adapter,
    merged,
    trained_parameters,
    without_adapter,
    worthwhile_layers,
)
from diffusers_sde.training.policy_configuration import PolicyTrainingConfig
from diffusers_sde.training.rl import PolicyTrainer

peft = pytest.importorskip("peft")

LORA = {"lora_rank": 2, "lora_alpha": 3.0}


def brightness(images, labels):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    SDEPipeline(tiny_unet(1.0), FlowSDEScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(20))


def policy_trainer(model, folder, **options):
    of_run = {"group_size": 6, "num_inference_steps": 4, "max_train_steps": 3, "sample_every": 0, "learning_rate": 1e-2}
    of_run |= {"checkpointing_steps": 1, "num_sample_images": 4, "logger": "none", "mixed_precision": "no"}
    config = PolicyTrainingConfig(model=model, reward="x:y", output_dir=str(folder), **(of_run | LORA | options))
    return PolicyTrainer(config, brightness)


def trainer(model, folder, digits, **options):
    of_run = {"init_from": model, "train_batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2}
    of_run |= {"sample_every": 0, "logger": "none", "mixed_precision": "no", "sde": "flow", "learning_rate": 1e-2}
    return Trainer(TrainingConfig(output_dir=str(folder), **(of_run | LORA | options)), digits)


def images_of(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(4, 3, torch.Generator().manual_seed(1), output_type="pt", return_dict=False)[0]


def network_of(kind):
    """A network with weights that are nowhere zero."""
    sizes = {"sample_size": 8, "in_channels": 1}
    torch.manual_seed(0)
    if kind == "unet":
        return tiny_unet(1.0)
    if kind == "dit":
        of_transformer = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_embeds_ada_norm": 0}
        network = DiTTransformer2DModel(**sizes, **of_transformer)
    elif kind == "pixart":
        network = pixart(num_layers=1)
    else:
        network = NCSNpp(**sizes, block_out_channels=(8, 8), layers_per_block=1, attention_resolutions=(4,))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
    return network.eval()


# ---------------------------------------------------------------------- what an adapter computes


@pytest.mark.parametrize("kind", ["unet", "dit", "ncsnpp", "pixart"])
def test_a_merged_network_is_the_adapted_one(kind):
    """W + (alpha/r) B A, typed in for one layer; the outputs of the whole network agree for all."""
    network = network_of(kind).requires_grad_(False)  # as the adapter leaves it: torch takes other kernels then
    before = {name: value.clone() for name, value in network.state_dict().items()}
    arguments = {
        "dit": {"class_labels": torch.tensor([0, 0])},
        "pixart": {"encoder_hidden_states": torch.ones(2, 3, 16)},
    }

    def output(network):
        return call_network(network, torch.ones(2, 1, 8, 8), torch.tensor([3.0, 500.0]), **arguments.get(kind, {}))

    with torch.no_grad():
        original = output(network)
        add_adapter(network, AdapterOptions(**LORA), seed=0)
        assert torch.equal(output(network), original)  # B begins at zero
        for parameter in trained_parameters(network):
            parameter.normal_(std=0.2)
        adapted, whole = output(network), merged(network)
        assert (adapted - original).abs().max() > 0.01
        torch.testing.assert_close(output(whole), adapted, rtol=1e-3, atol=1e-3)
        with without_adapter(network):
            assert torch.equal(output(network), original)
        assert torch.equal(output(network), adapted)
    assert whole.state_dict().keys() == before.keys() and type(whole) is type(network)
    layer = next(name for name, module in network.named_modules() if isinstance(module, peft.tuners.lora.Linear))
    a, b = (network.get_submodule(f"{layer}.lora_{letter}.default").weight for letter in "AB")
    assert a.shape[0] == b.shape[1] == 2
    torch.testing.assert_close(whole.get_submodule(layer).weight, before[f"{layer}.weight"] + 1.5 * b @ a)
    assert all(p.requires_grad == (".lora_" in name) for name, p in network.named_parameters())


def test_an_adapter_goes_where_it_saves_weights():
    network = nn.ModuleDict({"wide": nn.Linear(9, 9), "thin": nn.Linear(9, 2), "conv": nn.Conv2d(2, 6, 3)})
    network["depthwise"] = nn.Conv2d(8, 8, 3, groups=8)
    # r (rows + columns) < rows columns: 2 (9 + 9) < 81, but 2 (2 + 9) > 18; the convolution is 6 x 18.
    assert worthwhile_layers(network, 2) == ["wide", "conv"]
    assert worthwhile_layers(network, 5) == []
    with pytest.raises(ValueError, match="lora_rank 5 leaves no layer"):
        add_adapter(network, AdapterOptions(lora_rank=5), seed=0)
    with pytest.raises(ValueError, match="lora_target_modules \\['to_q'\\] do not fit this network"):
        add_adapter(network, AdapterOptions(lora_rank=1, lora_target_modules=("to_q",)), seed=0)
    with pytest.raises(ValueError, match="lora_alpha must be None without lora_rank"):
        AdapterOptions(lora_alpha=1.0)


# ---------------------------------------------------------------------- runs


def check_saved(model, folder, result):
    """The pipeline loads without peft, and the adapter beside it makes it of the original network."""
    saved = DiffusionPipeline.from_pretrained(folder)
    assert not any(".lora_" in name for name in saved.unet.state_dict())
    torch.testing.assert_close(images_of(saved), images_of(result))
    original = SDEPipeline.from_pretrained(model)
    x, t = torch.ones(2, 1, 8, 8), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        outputs = [saved.unet(x, t).sample, original.unet(x, t).sample]
        adapted = peft.PeftModel.from_pretrained(original.unet, folder / "adapter")
        assert adapted.peft_config["default"].r == 2
        outputs.append(original.unet(x, t).sample)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=0, atol=1e-5)


def check_checkpoint(folder):
    saved = load_file(folder / "model.safetensors")
    assert saved and all(".lora_" in name for name in saved)


@pytest.mark.parametrize("options", [{"kl_weight": 0.1}, {"method": "nft", "kl_weight": 0.1, "use_ema": False}])
def test_reinforcement_learning_of_an_adapter_is_resumed_bit_for_bit(model, tmp_path, options):
    first = policy_trainer(model, tmp_path / "run", **options)
    assert first.reference.network is first.network  # no second copy
    result = first.run()
    check_saved(model, tmp_path / "run", result)
    check_checkpoint(tmp_path / "run" / "checkpoint-1")
    for step in (2, 3):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    resumed = policy_trainer(model, tmp_path / "run", resume_from_checkpoint="latest", **options)
    assert resumed.step == 1
    own, whole = resumed.run().unet.state_dict(), result.unet.state_dict()
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="trained with lora_rank=2, this run has 3"):
        policy_trainer(model, tmp_path / "run", lora_rank=3, resume_from_checkpoint="latest", **options)


def test_the_reference_of_an_adapter_is_the_network_without_it(model, tmp_path):
    """The KL of the paths is that to a pipeline that was loaded anew."""
    run = policy_trainer(model, tmp_path, checkpointing_steps=0)
    run._prepare()
    for _ in range(2):
        run.round()
    with_adapter = run.path_kl(run.network)
    run.reference._pipe, run.reference._adapted = run._pipeline(SDEPipeline.from_pretrained(model).unet), False
    assert with_adapter[0] > 0.0 and run.path_kl(run.network) == pytest.approx(with_adapter)


def test_training_of_an_adapter_is_resumed_bit_for_bit(model, tmp_path, digits):
    result = trainer(model, tmp_path / "run", digits, gradient_checkpointing=True).run()
    check_saved(model, tmp_path / "run", result)
    check_checkpoint(tmp_path / "run" / "checkpoint-2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = trainer(model, tmp_path / "run", digits, gradient_checkpointing=True, resume_from_checkpoint="latest")
    assert resumed.step == 2
    own, whole = resumed.run().unet.state_dict(), result.unet.state_dict()
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    SDEPipeline(tiny_unet(2.0), FlowSDEScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained with frozen_weights="):
        trainer(str(tmp_path / "other"), tmp_path / "run", digits, resume_from_checkpoint="latest")
    again = trainer(model, tmp_path / "run", digits, overwrite_output_dir=True, lora_rank=None, lora_alpha=None)
    again.run()
    assert not (tmp_path / "run" / "adapter").exists()


def test_an_adapter_needs_a_trained_network_that_is_whole(model, tmp_path, digits, monkeypatch):
    monkeypatch.setattr("diffusers_sde.training.trainer.is_sharded", lambda accelerator: True)
    with pytest.raises(ValueError, match="lora_rank cannot be used with FSDP"):
        trainer(model, tmp_path, digits)
    with pytest.raises(ValueError, match="lora_rank needs init_from"):
        TrainingConfig(output_dir=str(tmp_path), lora_rank=2)


def test_an_adapter_of_a_transformer_and_of_ncsnpp_is_trained(tmp_path, digits):
    for kind, scheduler in (("ncsnpp", VPSDEScheduler()), ("dit", VPSDEScheduler())):
        network = network_of(kind)
        SDEPipeline(network, scheduler).save_pretrained(tmp_path / kind)
        options = {"sde": "vp", "max_train_steps": 1, "checkpointing_steps": 0, "learning_rate": 1e-2, "use_ema": False}
        result = trainer(str(tmp_path / kind), tmp_path / f"{kind}-run", digits, **options).run()
        before, after = network.state_dict(), result.unet.state_dict()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed and all(name.endswith(".weight") for name in changed)
