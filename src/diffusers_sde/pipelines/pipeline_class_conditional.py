"""Generation by class: classifier-free guidance, and guidance by a classifier of noisy images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from ..basics.checks import check_generators, check_integer
from ..basics.networks import traits_of
from ..basics.noise import fork
from ..guidance.classes import check_interval, classifier_free_guidance, classifier_guidance, guide_within
from ..guidance.common import check_scale
from ..networks.classifier import NoiseConditionalClassifier
from .pipeline_sde import SDEPipeline
from .probability_flow import ProbabilityFlow
from .runs import (
    Callback,
    RunOptions,
    at_temperature,
    execute_guided,
    finished,
    latents_shape,
    names_near_arguments,
    own_scheduler,
    starting_noise,
    unet_denoiser,
)


class ClassConditionalSDEPipeline(SDEPipeline):
    """Draw images of given classes, from a network that knows them or by a classifier, or both.

    A network trained with label dropout has one more class, the null class, which stands for "any". With it,
    classifier-free guidance (Ho & Salimans 2022) sharpens the class; both halves are one batched call. A
    ``NoiseConditionalClassifier`` guides every network, with classes or without (Song et al. 2021, section 5).
    Correctors take the guided score, which for a scale other than 1 is not the score of any marginal.

    Args:
        unet: As in ``SDEPipeline``. It knows classes if its config has ``num_class_embeds``, or if it is a
            ``DiTTransformer2DModel``, and is then called with ``class_labels``, int64 of shape (B,).
        scheduler: One of this package's schedulers.
        data_min: As in ``SDEPipeline``.
        data_max: As in ``SDEPipeline``.
        id2label: Name of each class, by its number; the classifier's names if None. JSON turns the numbers into
            strings; both are understood.
        null_class: Number of the null class; None for a network without one, which allows ``guidance_scale`` 1 only.
        classifier: Classifier of noisy images; optional for a network that knows classes.
        sample_shape: As in ``SDEPipeline``.
        vae: As in ``SDEPipeline``.
        latents_mean: As in ``SDEPipeline``.
        latents_std: As in ``SDEPipeline``.

    Example:
        ```py
        from diffusers_sde import ClassConditionalSDEPipeline, NoiseConditionalClassifier

        pipe = ClassConditionalSDEPipeline.from_pretrained("outputs/digits")
        images = pipe(class_labels=[3, "seven"], guidance_scale=2.0).images
        images = pipe(batch_size=16, generator=torch.manual_seed(0)).images  # of random classes

        classifier = NoiseConditionalClassifier.from_pretrained("outputs/digits-classifier")
        pipe = ClassConditionalSDEPipeline.from_pretrained("outputs/unconditional", classifier=classifier)
        images = pipe(class_labels=[3, "seven"], classifier_guidance_scale=2.0).images
        ```
    """

    _optional_components = ["vae", "classifier"]
    _exclude_from_cpu_offload = ["classifier"]  # it takes turns with the network at every step

    def __init__(
        self,
        unet: torch.nn.Module,
        scheduler: SchedulerMixin,
        data_min: float = -1.0,
        data_max: float = 1.0,
        id2label: Mapping | None = None,  # bare: diffusers compares types, and JSON makes its keys strings
        null_class: int | None = None,
        classifier: NoiseConditionalClassifier | None = None,
        sample_shape: Sequence[int] | None = None,
        vae: ModelMixin | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__(unet, scheduler, data_min, data_max, null_class, sample_shape, vae, latents_mean, latents_std)
        if not self._knows_classes and classifier is None:
            raise ValueError(
                "unet knows no classes (its config has no num_class_embeds): pass a classifier or use SDEPipeline."
            )
        self.register_modules(classifier=classifier)
        if id2label is not None and not isinstance(id2label, Mapping):
            raise ValueError(f"id2label must map numbers of classes to their names, got {id2label!r}.")
        names = {str(number): str(name) for number, name in (id2label or {}).items()}
        bad = [number for number in names if not number.isdecimal() or int(number) >= self.num_classes]
        if bad:
            raise ValueError(f"id2label must name classes in [0, {self.num_classes}), got {bad}.")
        if len(set(names.values())) < len(names):
            raise ValueError("id2label must give every class a name of its own.")
        self.register_to_config(id2label=names or None)

    @property
    def _knows_classes(self) -> bool:
        return traits_of(self.unet).num_classes is not None

    @property
    def num_classes(self) -> int:
        """Classes that ``class_labels`` may hold, a null class included."""
        return int(traits_of(self.unet).num_classes or self.classifier.config.num_classes)

    @property
    def _classes(self) -> list[int]:
        """Numbers of the classes that can be asked for."""
        return [number for number in range(self.num_classes) if number != self.config.null_class]

    @property
    def drawn_classes(self) -> Tensor:
        """Numbers of the classes of the last run's images, shape (B,); the null class stands for none."""
        return self._drawn_classes

    @property
    def labels(self) -> dict[str, int]:
        """Number of each class by its name; empty where the classes have no names."""
        names = self.config.id2label or (self.classifier.config.id2label if self.classifier is not None else None)
        return {name: int(number) for number, name in (names or {}).items()}

    @names_near_arguments
    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        class_labels: int | str | Sequence[int | str] | Tensor | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        classifier_guidance_scale: float | None = None,
        method: str = "scheduler",
        rtol: float | None = None,
        atol: float | None = None,
        batch_size: int | None = None,
        temperature: float | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each label.

        Args:
            class_labels: Numbers or names. None draws one class for each image, all with the same probability and from
                ``generator``; ``drawn_classes`` says which they were. With ``guidance_scale`` 0 none is drawn.
            guidance_scale: Strength of classifier-free guidance. 1 is the class as the network knows it, larger values
                sharpen it at the expense of variety, 0 ignores it. Other values than 0 and 1 double the batch.
            guidance_interval: Noise-to-signal ratios sigma/alpha between which to guide. Outside, ``guidance_scale``
                is 1 and the classifier is silent. None guides everywhere. (0.2, 3.0) is a common choice.
            num_inference_steps: Noise levels; each costs ``scheduler.order`` network calls.
            generator: One generator, or a list with one for each image.
            output_type: As in ``SDEPipeline``.
            latents: Unit noise to start from, shape (B, C, H, W).
            callback_on_step_end: As in ``SDEPipeline``.
            return_dict: Whether to return an ``ImagePipelineOutput`` instead of a tuple.
            classifier_guidance_scale: Factor on the classifier's gradient, which is added to the network's estimate: 1
                is Bayes' rule for a network without classes (or with ``guidance_scale`` 0), larger values sharpen. None
                is 1 for a network without classes and 0 for one that knows them.
            method: As in ``SDEPipeline``.
            rtol: As in ``SDEPipeline``.
            atol: As in ``SDEPipeline``.
            batch_size: How many images. It may be left out where ``class_labels`` or ``latents`` say it, and else is 1.
                One label is repeated for all images.
            temperature: As in ``SDEPipeline``.

        Returns:
            The images.

        Raises:
            ValueError: A label out of range or unknown, or another bad argument; nothing has been computed then.
            TypeError: An argument that this pipeline does not have; the message names the nearest one.
        """
        run = RunOptions(
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            latents=latents,
            callback_on_step_end=callback_on_step_end,
            return_dict=return_dict,
            method=method,
            rtol=rtol,
            atol=atol,
        )
        own_scheduler(self)
        with at_temperature(self, temperature):
            denoiser = self.denoiser(guidance_scale, classifier_guidance_scale, guidance_interval)
            numbers = None if class_labels is None else self.class_numbers(class_labels)
            shape = self._shape_of_run(numbers, batch_size, latents)
            if numbers is None and self._ignores_class(guidance_scale, classifier_guidance_scale, guidance_interval):
                numbers = [self.config.null_class or 0]
            elif numbers is None:
                numbers = self._random_numbers(shape[0], run.generator)
            numbers = numbers * shape[0] if len(numbers) == 1 else numbers
            labels = torch.tensor(numbers, dtype=torch.int64, device=self._execution_device)
            noise = starting_noise(self, run, shape)
            self._drawn_classes = labels
            x = execute_guided(self, run, noise, lambda index: partial(denoiser, class_labels=labels[index]))
        return finished(self, run, x)

    def denoiser(
        self,
        guidance_scale: float = 1.0,
        classifier_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Callable[..., Tensor]:
        """The guided estimate, (x_t, t, class_labels) -> x0_hat, with labels as int64 of shape (B,).

        It goes wherever a denoiser goes: ``sample``, ``log_prob``, ``ode``. Arguments are those of the call.

        Raises:
            ValueError: Scales that the network and the classifier cannot serve.
        """
        check_scale("guidance_scale", guidance_scale)
        check_interval(guidance_interval)
        config, knows_classes = self.config, self._knows_classes
        if classifier_guidance_scale is None:
            classifier_guidance_scale = 0.0 if knows_classes else 1.0
        check_scale("classifier_guidance_scale", classifier_guidance_scale)
        if guidance_scale != 1.0 and config.null_class is None:
            raise ValueError(
                f"guidance_scale must be 1 for a network without {'a null class' if knows_classes else 'classes'}, got "
                f"{guidance_scale!r}: train with label dropout and name the class that stood for dropped labels in "
                "null_class, or use classifier_guidance_scale."
            )
        if classifier_guidance_scale:
            if self.classifier is None:
                raise ValueError("classifier_guidance_scale needs a pipeline with a classifier, this one has none.")
            self.classifier.check_fits(self.scheduler.sde, self.sample_shape, config.data_min, config.data_max)
        return partial(self._denoise, guidance_scale, classifier_guidance_scale, guidance_interval)

    def _denoise(
        self,
        scale: float,
        by_classifier: float,
        interval: tuple[float, float] | None,
        x: Tensor,
        t: Tensor,
        class_labels: Tensor,
    ) -> Tensor:
        sde, null_class = self.scheduler.sde, self.config.null_class
        null = class_labels if null_class is None else torch.full_like(class_labels, null_class)
        guided = classifier_free_guidance(self._conditional, class_labels, null, scale)
        if by_classifier:
            log_prob = self.classifier.log_prob(sde, class_labels)
            guided = classifier_guidance(guided, sde, log_prob, by_classifier)
        as_it_is = classifier_free_guidance(self._conditional, class_labels, null, 1.0)
        return guide_within(interval, guided, as_it_is, sde)(x, t)

    def _conditional(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        arguments = {"class_labels": labels} if self._knows_classes else {}
        return unet_denoiser(self, self.scheduler, **arguments)(x, t)

    def probability_flow(
        self,
        guidance_scale: float = 1.0,
        classifier_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> ProbabilityFlow:
        """The guided flow, for the likelihoods and codes of images given their classes.

        Pass ``conditioning={"class_labels": labels}`` to its methods. At scale 1 it is that of log p(x | class); at
        others it is a density too, but of no diffusion. Arguments are those of the call.

        Example:
            ```py
            flow = pipe.probability_flow(classifier_guidance_scale=1.0)
            flow.bits_per_dim(images, conditioning={"class_labels": labels}).mean
            ```
        """
        denoiser = self.denoiser(guidance_scale, classifier_guidance_scale, guidance_interval)
        return ProbabilityFlow(self, denoiser=denoiser)

    def _shape_of_run(self, numbers: list[int] | None, batch_size: Any, latents: Any) -> tuple[int, ...]:
        """Return the shape (B, C, H, W) that labels, ``batch_size`` and latents agree on.

        Raises:
            ValueError: They do not agree.
        """
        if latents is not None:
            shape = latents_shape(self, latents)
        else:
            count = len(numbers or [0]) if batch_size is None else check_integer("batch_size", batch_size, at_least=1)
            shape = (count, *self.sample_shape)
        if batch_size not in (None, shape[0]):
            raise ValueError(f"batch_size must be that of latents, {shape[0]}, or None, got {batch_size!r}.")
        if numbers is not None and len(numbers) not in (1, shape[0]):
            raise ValueError(f"class_labels must be one, or one for each of {shape[0]} images, got {len(numbers)}.")
        return shape

    def _ignores_class(self, scale: float, by_classifier: float | None, interval: Any) -> bool:
        """Return whether the guided estimate is the same for every class."""
        if not self._knows_classes:
            return by_classifier == 0.0
        return scale == 0.0 and not by_classifier and interval is None

    def _random_numbers(self, count: int, generator: Any) -> list[int]:
        """Draw classes other than the null class, each with the same probability.

        The generators are left as they are, so that the images start from the same noise as with labels that are given.
        """
        allowed = self._classes
        drawn = fork(check_generators(generator, count), torch.device(self._execution_device))
        if isinstance(drawn, torch.Generator):
            places = torch.randint(len(allowed), (count,), generator=drawn, device=drawn.device).tolist()
        else:
            places = [int(torch.randint(len(allowed), (), generator=g, device=g.device)) for g in drawn or ()]
        return [allowed[place] for place in places]

    def class_numbers(self, class_labels: Any) -> list[int]:
        """Return the number of each class, given numbers or names.

        Raises:
            ValueError: A number out of range, an unknown name, or the null class.
        """
        if isinstance(class_labels, (Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (int, str)):
            class_labels = [class_labels]
        if not isinstance(class_labels, Sequence) or isinstance(class_labels, bytes) or not class_labels:
            raise ValueError(f"class_labels must be numbers or names, at least one, got {class_labels!r}.")
        names, null_class = self.labels, self.config.null_class
        numbers = []
        for label in class_labels:
            if isinstance(label, str) and label not in names:
                known = ", ".join(names) if names else "none: this pipeline's classes have no names"
                raise ValueError(f"class_labels holds {label!r}, but the names are {known}.")
            number = names[label] if isinstance(label, str) else label
            if number == null_class:
                raise ValueError(
                    f"class_labels must not hold {label!r}, the null class, which stands for any class: set "
                    "guidance_scale=0 to draw from all."
                )
            numbers.append(check_integer("class_labels", number, at_least=0, at_most=max(self._classes)))
        return numbers
