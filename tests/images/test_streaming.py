"""Streams: the same numbered samples on every layout, exact resumption, and what a stream must be told."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde.images.loading import load_digits, load_images
from diffusers_sde.images.samples import batches
from diffusers_sde.images.source import ImageSource
from diffusers_sde.images.streaming import StreamedSamples, StreamSource
from diffusers_sde.training import Trainer, TrainingConfig, train

COUNT = 22  # images: no multiple of a batch, so passes end within batches


@pytest.fixture(scope="module")
def digits():
    return load_digits().select(range(COUNT))


def tiny(output_dir="unused", **options):
    defaults = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "train_batch_size": 4,
        "max_train_steps": 9,
        "shuffle_buffer": 8,
        "sample_every": 0,
        "checkpointing_steps": 0,
        "mixed_precision": "no",
        "logger": "none",
    }
    return TrainingConfig(output_dir=str(output_dir), **(defaults | options))


def shards(digits, config=None):
    return StreamSource(digits.to_iterable_dataset(num_shards=3), config or tiny())


def samples_of(source, **options):
    return StreamedSamples(source, seed=3, random_flip=True, **options)


def take(iterator, count):
    pieces = [next(iterator) for _ in range(count)]
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def weights(pipeline):
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])


def test_every_pass_shows_every_image_once_in_another_order(digits):
    source = shards(digits)
    rows = source.rows(0)
    passes = [np.stack([source.prepare(*next(rows)) for _ in range(COUNT)]) for _ in range(2)]
    whole = ImageSource(digits, TrainingConfig()).get_many(range(COUNT))
    for images in passes:
        assert sorted(i.tobytes() for i in images) == sorted(i.tobytes() for i in whole)
        assert not np.array_equal(images, whole)
    assert not np.array_equal(*passes)
    assert source.epoch(COUNT - 1) == 0 and source.num_images is None


def test_without_a_buffer_a_stream_has_its_own_order_and_the_samples_of_map_style(digits):
    config = tiny(shuffle_buffer=0, class_conditional=True)
    source = StreamSource(digits.to_iterable_dataset(), config)
    streamed = take(batches(samples_of(source, strata=4), 0, 4), 5)
    mapped = ImageSource(digits, config).samples(3, True, 4).__getitems__(list(range(20)))
    assert torch.equal(streamed["labels"], torch.tensor(digits["label"][:20]))
    for key in ("noise", "u", "label_draw"):
        assert torch.equal(streamed[key], mapped[key])


def test_two_processes_share_the_batches_of_one(digits):
    samples = samples_of(shards(digits, tiny(class_conditional=True)))
    one = take(batches(samples, 0, 8), 7)  # over two ends of passes
    dealt = [batches(samples_of(shards(digits, tiny(class_conditional=True))), 0, 4, p, 2) for p in range(2)]
    pieces = [next(dealt[i % 2]) for i in range(14)]
    assert_same(one, {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]})


def test_loading_in_other_processes_changes_nothing(digits):
    here, there = (take(batches(samples_of(shards(digits)), 0, 4, num_workers=n), 7) for n in (0, 1))
    assert_same(here, there)


@pytest.mark.parametrize("seen", [8, COUNT, 52])
def test_a_stream_goes_on_where_it_was(digits, seen):
    first = shards(digits)
    whole = take(batches(samples_of(first), 0, 2), 35)
    assert first.pass_at(seen) == (seen // COUNT, seen // COUNT * COUNT)
    state = json.loads(json.dumps(first.state(seen)))
    again = shards(digits)
    again.resume({**state, "step": 5})
    assert_same(
        {key: value[seen:] for key, value in whole.items()}, take(batches(samples_of(again), seen, 2), 35 - seen // 2)
    )


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, digits):
    options = {"gradient_accumulation_steps": 2, "checkpointing_steps": 4, "streaming": True, "random_flip": True}
    whole = train(tiny(tmp_path / "whole", **options), digits)
    interrupted = Trainer(tiny(tmp_path / "resumed", **options), digits)
    loss, calls = interrupted.loss, iter(range(20))

    def power_cut(batch):
        if next(calls) == 13:
            raise KeyboardInterrupt
        return loss(batch)

    interrupted.loss = power_cut
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()
    resumed = Trainer(tiny(tmp_path / "resumed", **options, resume_from_checkpoint="latest"), digits)
    assert (resumed.step, resumed.samples_seen) == (4, 32)
    assert torch.equal(weights(resumed.run()), weights(whole))
    with pytest.raises(ValueError, match="shuffle_buffer=8"):
        Trainer(tiny(tmp_path / "resumed", **options, shuffle_buffer=9, resume_from_checkpoint="latest"), digits)


def test_folder_parquet_saved_data_set_and_digits_are_streamed(tmp_path):
    for i in range(6):
        folder = tmp_path / "folder" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    cache = str(tmp_path / "cache")
    mapped = load_images(TrainingConfig(train_data_dir=str(tmp_path / "folder"), cache_dir=cache))
    mapped.to_parquet(str(tmp_path / "train.parquet"))
    mapped.save_to_disk(str(tmp_path / "saved"))
    expected = {row["image"].tobytes(): row["label"] for row in mapped}
    for path in ("folder", "train.parquet", "saved"):
        config = tiny(train_data_dir=str(tmp_path / path), cache_dir=cache, streaming=True, class_conditional=True)
        stream = load_images(config)
        assert isinstance(stream, datasets.IterableDataset)
        source = StreamSource(stream, config)
        assert (source.channels, source.resolution, source.class_names) == (3, 8, ["class0", "class1"])
        batch = take(batches(StreamedSamples(source, 0, False), 0, 6), 1)
        images = [np.ascontiguousarray(i.numpy().transpose(1, 2, 0)).tobytes() for i in batch["images"]]
        assert dict(zip(images, batch["labels"].tolist(), strict=True)) == expected
    digits = load_images(tiny(streaming=True, dataset_split="train[:5]"))
    assert isinstance(digits, datasets.IterableDataset) and len(list(digits)) == 5


def test_statistics_are_those_of_the_first_images(digits):
    mapped = ImageSource(digits, TrainingConfig())
    assert shards(digits).statistics() == pytest.approx(mapped.statistics())


def test_a_stream_of_ones_own_without_features(tmp_path):
    def rows():
        for i in range(6):
            yield {"image": Image.new("L", (8, 8), 40 * i), "kind": i % 3}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    options = {"class_conditional": True, "label_column": "kind", "max_train_steps": 2}
    with pytest.raises(ValueError, match="num_classes"):
        Trainer(tiny(tmp_path, **options), stream)
    pipeline = train(tiny(tmp_path, **options, num_classes=5), stream)
    assert pipeline.unet.config.num_class_embeds == 6
    source = StreamSource(stream, tiny(**options, num_classes=5))
    batch = take(batches(samples_of(source), 0, 6), 1)
    assert torch.equal(batch["labels"], (batch["images"][:, 0, 0, 0] // 40 % 3).long())


def test_labels_out_of_range_are_refused(digits):
    source = shards(digits, tiny(class_conditional=True))
    with pytest.raises(ValueError, match=r"labels in \[0, 10\), the data hold 10"):
        source.labels_of([{"label": 9}, {"label": 10}])


def test_broken_images_are_refused_or_left_out(digits, caplog):
    encoded = list(digits.cast_column("image", datasets.Image(decode=False)))
    encoded[4]["image"] = {"path": "cut.png", "bytes": encoded[4]["image"]["bytes"][:40]}
    broken = datasets.Dataset.from_list(encoded, features=digits.features)
    with pytest.raises(ValueError, match="cannot be used.*skip_broken_images"):
        shards(broken)
    source = shards(broken, tiny(skip_broken_images=True))
    assert "cut.png" in caplog.text
    rows = source.rows(0)
    numbers = [next(rows)[0] for _ in range(COUNT)]
    assert numbers == list(range(COUNT)) and source.pass_at(COUNT - 1) == (1, COUNT - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_train_steps": None}, "max_train_steps"),
        ({"save_images_epochs": 2}, "save_images_epochs"),
        ({"save_model_epochs": 2}, "save_model_epochs"),
        ({"image_column": "picture"}, "image_column must be one of image, label"),
    ],
)
def test_what_a_stream_must_be_told(digits, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        Trainer(tiny(tmp_path, **options), digits.to_iterable_dataset(num_shards=3))
    with pytest.raises(ValueError, match=words):
        Trainer(tiny(tmp_path, **options, streaming=True), digits)


def test_an_empty_stream_is_refused():
    def rows():
        yield from ()

    with pytest.raises(ValueError, match="empty"):
        StreamSource(datasets.IterableDataset.from_generator(rows), tiny())
