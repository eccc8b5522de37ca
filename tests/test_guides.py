"""The README and the guides: their code runs as it stands, their commands parse, no block is left out in silence."""

import re
import shlex
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from code_blocks import code_blocks
from hub_models import use_hub
from loopback_hub import TOKEN, LoopbackHub, Repository
from tiny_networks import tiny_unet
from tiny_parts import conditional_unet, flux_transformer, seeded, tiny_text, tiny_vae

import diffusers_sde
from diffusers_sde import ClassConditionalSDEPipeline, NoiseConditionalClassifier, SDEPipeline, VPSDEScheduler
from diffusers_sde.basics.options import parse_options
from diffusers_sde.evaluation import EvaluationConfig, SamplingConfig
from diffusers_sde.hub.convert import ConvertConfig
from diffusers_sde.hub.export import ExportConfig
from diffusers_sde.training import PolicyTrainingConfig, parse_args
from diffusers_sde.training.cli import CLASSIFIER, ClassifierTrainingConfig, build_parser
from diffusers_sde.training.fits import FitConfig

ROOT = Path(__file__).resolve().parents[1]
GUIDES = {
    page.stem: page
    for page in [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
}
WITH_CODE = [name for name, page in GUIDES.items() if code_blocks(page.read_text(encoding="utf-8"))]


# ---------------------------------------------------------------------- Python


def stable_diffusion(text):
    return diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        unet=conditional_unet(cross_attention_dim=16),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux(text):
    return diffusers.FluxPipeline(
        transformer=flux_transformer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(),
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        text_encoder_2=text.t5,
        tokenizer_2=text.t5_tokenizer,
    )


def cifar10(text):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    network = seeded(
        lambda: diffusers.UNet2DModel(32, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    )
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())


# What the guides take from the Hub, with a handful of parameters.
REPOSITORIES = {
    "black-forest-labs/FLUX.1-dev": flux,
    "google/ddpm-cifar10-32": cifar10,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    text = tiny_text(tmp_path_factory.mktemp("tokenizer"))
    with LoopbackHub() as server:
        for name, make in REPOSITORIES.items():
            folder = tmp_path_factory.mktemp(name.replace("/", "+"))
            make(text).save_pretrained(folder)
            server.repositories[name] = Repository(private=False)
            files = [path for path in folder.rglob("*") if path.is_file()]
            server.repositories[name].commit(
                "A tiny model", {str(path.relative_to(folder)): path.read_bytes() for path in files}
            )
        yield server


@pytest.fixture
def workplace(monkeypatch, tmp_path, hub):
    """An empty folder but for what the commands of the guides leave in it, with a cache and a Hub of its own."""
    use_hub(monkeypatch, hub, TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names = {number: str(number) for number in range(10)}
    scheduler = VPSDEScheduler(prediction_type="v_prediction")  # of a network that returns almost 0: of Gaussian data
    SDEPipeline(tiny_unet(), scheduler).save_pretrained("outputs/digits")
    by_class = ClassConditionalSDEPipeline(tiny_unet(num_class_embeds=11), scheduler, id2label=names, null_class=10)
    by_class.save_pretrained("outputs/digits-by-class")
    by_class.save_pretrained("outputs/demo")
    classifier = NoiseConditionalClassifier(
        8, 1, 10, block_out_channels=(4, 8), attention_head_dim=4, norm_num_groups=2
    )
    classifier.eval().save_pretrained("outputs/digits-classifier")
    return tmp_path


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_guide_runs(name, workplace):
    """The blocks run one after another, as a reader pastes them."""
    names = {}
    for block in code_blocks(GUIDES[name].read_text(encoding="utf-8")):
        exec(compile(block, str(GUIDES[name]), "exec"), names)
    images = names.get("images", [names["image"]] if "image" in names else [])
    for image in images if isinstance(images, list) else []:
        assert image.size in ((8, 8), (16, 16), (32, 32))


def test_every_block_is_of_a_kind_that_is_tested():
    for page in GUIDES.values():
        kinds = re.findall(r"^```(\S*)\n.*?^```$", page.read_text(encoding="utf-8"), re.M | re.S)
        assert set(kinds) <= {"python", "bash"}, page.name


# ---------------------------------------------------------------------- command lines

PARSERS = {
    "train.py": parse_args,
    "train_classifier.py": lambda argv: ClassifierTrainingConfig(
        **vars(build_parser("train_classifier.py", CLASSIFIER, ClassifierTrainingConfig).parse_args(argv))
    ),
    "train_rl.py": lambda argv: parse_options(PolicyTrainingConfig, argv),
    "sample.py": lambda argv: parse_options(SamplingConfig, argv),
    "evaluate.py": lambda argv: parse_options(EvaluationConfig, argv),
    "push_to_hub.py": lambda argv: parse_options(ExportConfig, argv),
    "fit_sampler.py": lambda argv: parse_options(FitConfig, argv),
    "convert.py": lambda argv: parse_options(ConvertConfig, argv),
}


def commands():
    """(page, script, arguments) of every command line of a script in the guides."""
    for page in GUIDES.values():
        for block in re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for place, word in enumerate(words):
                    if word.startswith("scripts/") and word.endswith(".py"):
                        yield page.stem, word, words[place + 1 :]


@pytest.mark.parametrize(("page", "script", "arguments"), list(commands()))
def test_a_command_parses(page, script, arguments):
    assert (ROOT / script).is_file()
    PARSERS[Path(script).name](arguments)


@pytest.mark.parametrize("page", GUIDES)
def test_options_that_are_named_exist(page):
    """Options in the text, such as ``--skip_broken_images``, belong to one of the scripts."""
    text = re.sub(r"^```.*?^```$", "", GUIDES[page].read_text(encoding="utf-8"), flags=re.M | re.S)
    named = set(re.findall(r"`--(\w+)", text)) | set(re.findall(r"\s--(\w+) ", text))
    configs = (
        PolicyTrainingConfig,
        ClassifierTrainingConfig,
        SamplingConfig,
        EvaluationConfig,
        ExportConfig,
        ConvertConfig,
    )
    known = {f for config in configs for f in config.__dataclass_fields__} | set(vars(parse_args([])))
    assert named <= known | {"recipe", "resume_from_checkpoint"}, named - known


# ---------------------------------------------------------------------- stock schedulers


def same_draws():
    """(stock scheduler, class, arguments) of the rows that promise the same samples."""
    text = GUIDES["migration"].read_text(encoding="utf-8").partition("Others have")[0]
    return re.findall(r"^\| `(\w+Scheduler(?:\(.*?\))?)` \| `(\w+)` \| `(.*?)` \|$", text, re.M)


def draw(scheduler, x):
    """Samples of a smooth function in the place of a network."""
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(4)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.tanh(0.7 * scaled) + 0.1 * scaled.roll(1, -1)
        x = scheduler.step(output, t, x, **({} if "DDIM" in type(scheduler).__name__ else {"generator": generator}))[0]
    return x


@pytest.mark.parametrize(("stock", "name", "arguments"), same_draws())
def test_a_row_of_the_table_draws_what_the_stock_scheduler_draws(stock, name, arguments):
    cls, _, options = stock.partition("(")
    options = eval(f"dict({options.removesuffix(')')})")
    if cls in ("DDIMScheduler", "DDPMScheduler"):
        options["clip_sample"] = False
    if cls == "DPMSolverMultistepScheduler":
        options["timestep_spacing"] = "trailing"  # its last step otherwise depends on a flag that ours has not
    theirs = getattr(diffusers, cls)(**options)
    known = {}
    exec(code_blocks(GUIDES["migration"].read_text(encoding="utf-8"))[0], known)
    ours = getattr(diffusers_sde, name).from_config(theirs.config, **eval(f"dict({arguments})", known))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = draw(theirs, x)
    torch.testing.assert_close(draw(ours, x), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    defaults = getattr(diffusers_sde, name).from_config(theirs.config)  # the arguments of the row matter
    assert (draw(defaults, x) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_table_of_stock_schedulers_is_read():
    assert len(same_draws()) == 6
