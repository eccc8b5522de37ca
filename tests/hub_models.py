"""Tiny pipelines, and a client whose Hub is a loopback one."""

import hashlib
import tempfile
from pathlib import Path

import huggingface_hub
import torch
from tiny_networks import tiny_unet
from tiny_parts import conditional_unet, pixart, tiny_text

from diffusers_sde import (
    ClassConditionalSDEPipeline,
    InpaintSDEPipeline,
    NoiseConditionalClassifier,
    RestorationSDEPipeline,
    SDEPipeline,
    TextSDEPipeline,
    VESDEScheduler,
    VPSDEScheduler,
)


def tiny_pipeline(kind="vp"):
    if kind == "vp":
        pipe = SDEPipeline(tiny_unet(), VPSDEScheduler(predictor="reverse_diffusion", corrector="langevin", snr=0.1))
    elif kind == "ve":
        pipe = SDEPipeline(tiny_unet(), VESDEScheduler(sigma_max=20.0), data_min=0.0)
    elif kind == "classes":
        names = {0: "zero", 1: "one"}
        pipe = ClassConditionalSDEPipeline(
            tiny_unet(num_class_embeds=3), VPSDEScheduler(), id2label=names, null_class=2
        )
    elif kind == "guided":
        classifier = NoiseConditionalClassifier(
            8, 1, 2, block_out_channels=(4, 8), attention_head_dim=4, norm_num_groups=2
        )
        pipe = ClassConditionalSDEPipeline(tiny_unet(), VPSDEScheduler(), classifier=classifier.eval())
    elif kind in ("text", "pixart"):
        with tempfile.TemporaryDirectory() as folder:
            text = tiny_text(Path(folder))
        network = {"text": lambda: conditional_unet(cross_attention_dim=16, in_channels=1, out_channels=1)}
        unet = network.get(kind, pixart)()
        pipe = TextSDEPipeline(unet, VPSDEScheduler(), text.encoder, text.tokenizer, max_caption_length=8)
    elif kind == "inpaint":
        pipe = InpaintSDEPipeline(tiny_unet(), VPSDEScheduler(continuous=True))
    else:
        pipe = RestorationSDEPipeline(tiny_unet(), VPSDEScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fingerprint(pipe, **arguments):
    """Of two samples with a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    x = pipe(**{"batch_size": 2, **arguments}, num_inference_steps=4, generator=torch.manual_seed(1), output_type="pt")
    return hashlib.sha256(x.images.numpy().tobytes()).hexdigest()


def use_hub(monkeypatch, hub, token):
    """Point this process's client at the loopback Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Before 1.0 the client reads it here.
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
