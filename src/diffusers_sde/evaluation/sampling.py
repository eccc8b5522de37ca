"""The options of drawing many images, as one documented dataclass from which the command line is generated."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from ..basics.options import LARGEST_SEED, CheckedOptions, option
from ..pipelines.runs import METHODS
from ..sampling.correctors import CORRECTORS
from ..sampling.predictors import PREDICTORS
from .samplers import Sampler, parse_value

FORMATS = ("png", "npz")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(CheckedOptions):
    """What to draw; each field is the option of ``scripts/sample.py`` with the same name.

    Raises:
        ValueError: A value out of range or an unknown name.
    """

    model: str = option(MISSING, "Folder or Hub name of a pipeline.")
    output_dir: str = option(MISSING, "Where the images go. A folder with a part of the same images is completed.")
    num_images: int = option(MISSING, "How many images.", least=1)
    format: str = option(
        "png", "One PNG file per image, or one file samples.npz: arr_0, bytes (N, H, W, C).", choices=FORMATS
    )
    batch_size: int = option(64, "Images in one network call.", least=1)
    seed: int = option(0, "Seed of the set of images.", least=0, most=LARGEST_SEED)
    class_labels: tuple[str, ...] | None = option(
        None, "Classes, numbers or names, that images have in turn. Default: all classes."
    )

    prompts: tuple[str, ...] | None = option(
        None, "Captions that images have in turn, for a model that is told captions. Default: the empty one."
    )

    scheduler: str | None = option(None, "Scheduler class of this package or of diffusers. Default: the model's own.")
    num_inference_steps: int | None = option(None, "Noise levels. Default: 100.", least=1)
    predictor: str | None = option(None, "Default here and below: the model's own.", choices=tuple(PREDICTORS))
    corrector: str | None = option(None, "MCMC at each noise level.", choices=("none", *CORRECTORS))
    correct_steps: int | None = option(None, "Corrector steps per noise level.", least=1)
    snr: float | None = option(None, "Signal-to-noise ratio of the corrector's step size.", above=0.0)
    probability_flow: bool | None = option(None, "The probability-flow ODE instead of the reverse SDE.")
    stochasticity: float | None = option(None, "Eta of the reverse SDE: 1 is Anderson's, 0 the ODE.", least=0.0)
    solver_order: int | None = option(None, "Order of the exponential predictor.", least=1, most=3)
    time_grid: str | None = option(None, "sech, log_snr, karras, uniform, or none for timestep_spacing.")
    sampling_eps: float | None = option(None, "Last SDE time.", above=0.0)
    method: str | None = option(
        None, "'ode' or 'sde': the probability flow or the reverse SDE with adaptive steps.", choices=METHODS
    )
    rtol: float | None = option(None, "Relative tolerance of --method ode or sde.", above=0.0)
    atol: float | None = option(None, "Absolute tolerance of --method ode or sde.", above=0.0)
    guidance_scale: float | None = option(None, "Classifier-free guidance; 1 is none.", least=0.0)
    classifier_guidance_scale: float | None = option(None, "Guidance by the pipeline's classifier.", least=0.0)
    sampler: str | None = option(
        None, "Any further argument of the scheduler: 'key=value,key=value', such as 'rho=5,denoise_final=false'."
    )

    def __post_init__(self) -> None:
        if isinstance(self.class_labels, (list, tuple)):  # numbers are allowed; the command line gives words only
            object.__setattr__(self, "class_labels", tuple(str(label) for label in self.class_labels))
        super().__post_init__()

    def make_sampler(self) -> Sampler:
        """The sampler that the options describe."""
        names = [f.name for f in fields(self)]
        own = names[names.index("scheduler") : names.index("sampler")]
        given = {name: value for name in own if (value := getattr(self, name)) is not None}
        options = {name: parse_value(value) if isinstance(value, str) else value for name, value in given.items()}
        more = Sampler.parse(f"sample.py: {self.sampler or ''}").options
        twice = sorted(set(options) & set(more))
        if twice:
            raise ValueError(f"sampler repeats {', '.join(twice)}, which is given as an option of its own.")
        return Sampler("command line", {**options, **more})
