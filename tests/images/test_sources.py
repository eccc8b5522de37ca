"""Data: every kind of source, what is read off it, and samples that depend on their number alone."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sde.images.loading import load_digits, load_images
from diffusers_sde.images.samples import batches
from diffusers_sde.images.source import ImageSource
from diffusers_sde.images.streaming import open_source
from diffusers_sde.training import TrainingConfig


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def source(digits):
    return ImageSource(digits, TrainingConfig())


def _noise_image(seed, size=(8, 8), mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def _folder(root, images):
    for i, image in enumerate(images):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{i}.png")
    return root


def test_digits_are_scikit_learns(source):
    from sklearn.datasets import load_digits as load

    original = load()
    assert (len(source), source.channels, source.resolution) == (1797, 1, 8)
    assert source.class_names == [str(i) for i in range(10)]
    assert np.array_equal(source.labels.numpy(), original.target)
    pixels = np.stack([source.get(i)[0] for i in range(1797)])
    assert np.abs(pixels / 255.0 - original.images / 16.0).max() <= 0.5 / 255.0 + 1e-9
    assert pixels.max() == 255 and pixels.min() == 0


def test_digits_at_another_resolution(digits):
    source = ImageSource(digits.select(range(20)), TrainingConfig(resolution=16))
    assert source.get(3).shape == (1, 16, 16)


def test_image_folder_parquet_and_saved_data_set_agree(tmp_path):
    images = [_noise_image(i) for i in range(6)]
    folder = _folder(tmp_path / "folder", images)
    cache = str(tmp_path / "cache")
    from_folder = load_images(TrainingConfig(train_data_dir=str(folder), cache_dir=cache))
    (tmp_path / "parquet").mkdir()
    from_folder.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    from_folder.save_to_disk(str(tmp_path / "saved"))
    reference = None
    for path in (folder, tmp_path / "parquet", tmp_path / "parquet" / "train.parquet", tmp_path / "saved"):
        config = TrainingConfig(train_data_dir=str(path), cache_dir=cache)
        source = ImageSource(load_images(config), config)
        assert (len(source), source.channels, source.resolution) == (6, 3, 8)
        assert source.class_names == ["class0", "class1"]
        pixels = source.get_many(range(6))
        reference = pixels if reference is None else reference
        assert np.array_equal(pixels, reference)
    originals = {np.asarray(image).tobytes() for image in images}
    assert {p.transpose(1, 2, 0).tobytes() for p in reference} == originals


def test_mixed_sizes_need_a_resolution_and_then_crop(tmp_path):
    data = datasets.Dataset.from_dict(
        {"image": [_noise_image(0, (12, 8)), _noise_image(1, (8, 16))]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    with pytest.raises(ValueError, match="resolution"):
        ImageSource(data, TrainingConfig())
    central = ImageSource(data, TrainingConfig(resolution=8, center_crop=True))
    assert central.is_cached
    assert np.array_equal(central.get(0), np.asarray(data[0]["image"]).transpose(2, 0, 1)[:, :, 2:10])
    random = ImageSource(data, TrainingConfig(resolution=8))
    assert not random.is_cached
    columns = np.asarray(data[0]["image"]).transpose(2, 0, 1)
    crops = {random.get(0, np.random.default_rng(i)).tobytes() for i in range(60)}
    assert crops == {np.ascontiguousarray(columns[:, :, i : i + 8]).tobytes() for i in range(5)}


def test_on_the_fly_equals_cached(digits):
    few = digits.select(range(30))
    cached, read = (ImageSource(few, TrainingConfig(cache_images=c)) for c in (True, False))
    assert cached.is_cached and not read.is_cached
    a, b = (s.samples(0, True).__getitems__(list(range(50))) for s in (cached, read))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Image.new("1", (4, 4), 1), 255),
        (Image.new("L", (4, 4), 7), 7),
        (Image.new("LA", (4, 4), (0, 0)), 255),  # transparent: white
        (Image.new("La", (4, 4), (0, 0)), 255),
        (Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)), 255),
        (Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), 128),
        (np.full((4, 4), 9, dtype=np.uint8), 9),
        (np.full((1, 4, 4), 1.0), 255),
    ],
)
def test_grey_modes(value, expected):
    data = _raw([value])
    source = ImageSource(data, TrainingConfig())
    assert source.channels == 1
    assert (source.get(0) == expected).all()


def deep_files(folder):
    """16-bit grey files of every byte order: the same ramp of values in each."""
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(folder / "png.png")
    Image.fromarray(ramp).save(folder / "little.tif")
    Image.fromarray(ramp).save(folder / "pgm.pgm")
    header = b"MM\0*" + (8).to_bytes(4, "big")
    entries = {256: 16, 257: 16, 258: 16, 259: 1, 262: 1, 273: 134, 277: 1, 278: 16, 279: 512, 339: 1}
    table = b"".join(
        tag.to_bytes(2, "big") + (4).to_bytes(2, "big") + (1).to_bytes(4, "big") + value.to_bytes(4, "big")
        for tag, value in entries.items()
    )
    table = len(entries).to_bytes(2, "big") + table + bytes(4)
    assert 8 + len(table) == 134
    (folder / "big.tif").write_bytes(header + table + ramp.astype(">u2").tobytes())
    return ramp


def test_sixteen_bits_of_every_byte_order_are_the_same_image(tmp_path):
    ramp = deep_files(tmp_path)
    images = [Image.open(path) for path in sorted(tmp_path.iterdir())]
    assert {"I;16", "I;16B"} <= {image.mode for image in images}
    values = [*images, ramp, Image.frombytes("I;16L", (16, 16), ramp.astype("<u2").tobytes())]
    values += [Image.frombytes("I;16N", (16, 16), ramp.tobytes()), Image.fromarray(ramp.astype(np.int32))]
    source = ImageSource(_raw(values), TrainingConfig())
    assert source.channels == 1
    expected = np.rint(ramp / 257.0)
    for i in range(len(values)):
        assert np.array_equal(source.get(i)[0], expected), values[i]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_a_dark_frame_stays_dark(kind):
    """One scale for the whole data set: 218 of 65535 is nearly black, whatever the largest value of its image is."""
    ramp = np.arange(64, dtype=kind).reshape(8, 8)
    dark, bright = Image.fromarray(ramp * 3), Image.fromarray(ramp * 1000)
    source = ImageSource(_raw([bright, dark]), TrainingConfig())
    assert np.array_equal(source.get(1)[0], np.rint(ramp * 3 / 257.0))
    assert np.array_equal(source.get(0)[0], np.rint(ramp * 1000 / 257.0))


def test_the_white_level_can_be_named():
    ramp = (np.arange(64).reshape(8, 8) * 65).astype(np.uint16)  # up to 4095
    plain = np.arange(64, dtype=np.uint8).reshape(8, 8)
    values = [Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32)), ramp, ramp.astype(np.int64), plain]
    source = ImageSource(_raw(values), TrainingConfig(white_level=4095))
    for i in range(4):
        assert np.array_equal(source.get(i)[0], np.rint(ramp * (255.0 / 4095.0)))
    assert np.array_equal(source.get(4)[0], plain)  # bytes are bytes
    with pytest.raises(ValueError, match=r"Image 0 .*must lie in 0\.\.2000 \(white_level\), got 0 to 4095"):
        ImageSource(_raw(values[:1]), TrainingConfig(white_level=2000))
    with pytest.raises(ValueError, match=r"Image 0 .*must lie in 0\.\.65535 \(white_level\), got 0 to 70000"):
        ImageSource(_raw([Image.fromarray(np.array([[0, 70000]] * 2, dtype=np.int32))]), TrainingConfig())


def palette_image(colours, transparent=None):
    image = Image.new("P", (4, 4))
    image.putpalette([channel for colour in colours for channel in colour])
    image.putdata([0, 1] * 8)
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def test_lab_is_not_transparent():
    from PIL import ImageCms

    rgb = _noise_image(0)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(rgb, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    assert lab.mode == "LAB"
    source = ImageSource(_raw([lab]), TrainingConfig())
    error = source.get(0).astype(int) - np.asarray(rgb).transpose(2, 0, 1)
    assert np.abs(error).mean() < 4.0  # of colours rounded to bytes in LAB


def test_grey_palettes_are_grey():
    grey = palette_image([(10, 10, 10), (200, 200, 200), (255, 0, 0)])  # red is in the palette, not in the picture
    source = ImageSource(_raw([grey]), TrainingConfig())
    assert source.channels == 1 and source.get(0)[0].flatten().tolist() == [10, 200] * 8
    colour = palette_image([(10, 10, 10), (200, 200, 201)])
    assert ImageSource(_raw([colour]), TrainingConfig()).channels == 3
    assert ImageSource(_raw([grey, colour]), TrainingConfig()).channels == 3
    holes = ImageSource(_raw([palette_image([(10, 10, 10), (200, 200, 200)], transparent=0)]), TrainingConfig())
    assert holes.channels == 1 and holes.get(0)[0].flatten().tolist() == [255, 200] * 8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_parquet_of_files_without_the_type_of_images(tmp_path, kind, streaming):
    """As pandas and pyarrow write them: nothing says that the column holds images."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    images, encoded = [_noise_image(i) for i in range(4)], []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    column = [{"bytes": b, "path": None} for b in encoded] if kind == "struct" else encoded
    field = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if kind == "struct" else pa.binary()
    name = "picture" if kind == "struct" else "image"
    pq.write_table(pa.table({name: pa.array(column, field)}), tmp_path / "train.parquet")
    config = TrainingConfig(
        train_data_dir=str(tmp_path / "train.parquet"),
        cache_dir=str(tmp_path / "cache"),
        streaming=streaming,
        shuffle_buffer=0,
        max_train_steps=1,
    )
    source = open_source(load_images(config), config)
    assert np.array_equal(source.spread(4)[0], [np.asarray(image).transpose(2, 0, 1) for image in images])
    if streaming:
        number, row = next(source.rows(0))
        assert np.array_equal(source.prepare(number, row), source.spread(1)[0][0])


def _raw(values):
    """A stand-in for a data set whose rows are not encoded as PNG."""

    class Raw:
        features = {"image": None}

        def __len__(self):
            return len(values)

        def __getitem__(self, i):
            return {"image": values[i]}

        def select_columns(self, names):
            return self

    return Raw()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], ["empty"]),
        ([np.full((4, 4), 0.5), np.full((4, 4), np.nan)], ["Image 1", "not finite"]),
        ([Image.fromarray(np.full((4, 4), np.inf, dtype=np.float32))], ["Image 0", "not finite"]),
        ([np.full((4, 4), 3.0)], ["[0, 1]"]),
        ([np.full((4, 4), 300)], ["0..255"]),
        ([np.zeros((4, 4, 2, 2))], ["Image 0", "(4, 4, 2, 2)"]),
        ([None], ["Image 0"]),
        ([Image.new("L", (4, 6))], ["resolution"]),
        ([Image.new("L", (4, 4)), Image.new("L", (8, 8))], ["Image 1", "8x8", "resolution"]),
    ],
)
def test_unusable_images_are_named(values, words):
    with pytest.raises(ValueError) as error:
        ImageSource(_raw(values), TrainingConfig())
    assert all(word in str(error.value) for word in words), str(error.value)


def test_folders_without_images_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "missing"):
        with pytest.raises(ValueError, match="train_data_dir"):
            load_images(TrainingConfig(train_data_dir=str(path)))


def test_columns_are_named(digits):
    with pytest.raises(ValueError, match="image_column must be one of image, label, got 'picture'"):
        ImageSource(digits, TrainingConfig(image_column="picture"))
    with pytest.raises(ValueError, match="label_column"):
        ImageSource(digits, TrainingConfig(label_column="kind"))


def test_statistics_of_known_images():
    black, white = np.zeros((4, 4), dtype=np.uint8), np.full((4, 4), 255, dtype=np.uint8)
    std, largest = ImageSource(_raw([black, white, black, white]), TrainingConfig()).statistics()
    assert std == pytest.approx(1.0)
    assert largest == pytest.approx(8.0)  # sqrt(16 pixels x 2^2)


def test_every_epoch_shows_every_image_once(source):
    samples = source.samples(seed=3, random_flip=False)
    first, second = (samples.__getitems__(list(range(e * 1797, (e + 1) * 1797))) for e in range(2))
    whole = np.sort(source.get_many(range(1797)).reshape(1797, -1), axis=0)
    for epoch in (first, second):
        assert np.array_equal(np.sort(epoch["images"].numpy().reshape(1797, -1), axis=0), whole)
    assert not torch.equal(first["labels"], second["labels"])


def test_a_sample_depends_on_its_number_alone(source):
    samples = source.samples(seed=3, random_flip=True)
    stream = samples.__getitems__(list(range(100, 164)))
    # The same numbers dealt to two processes in micro-batches of 8, from number 100 on.
    dealt = [batches(samples, 100, 8, process, 2) for process in range(2)]
    pieces = [next(dealt[i % 2]) for i in range(8)]
    for key in stream:
        assert torch.equal(stream[key], torch.cat([piece[key] for piece in pieces]))


def test_loading_in_other_processes_changes_nothing(source):
    samples = source.samples(seed=3, random_flip=False)
    here, there = batches(samples, 0, 8), batches(samples, 0, 8, num_workers=1)
    for _ in range(3):
        a, b = next(here), next(there)
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_loading_leaves_the_global_generator_alone(source):
    before = torch.get_rng_state()
    next(batches(source.samples(0, True), 0, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_and_times_are_standard_and_independent(source):
    # 200 x 64 numbers per seed; bounds are six standard errors: a false alarm in 1e8.
    batch = source.samples(seed=5, random_flip=False).__getitems__(list(range(4000)))
    noise, u = batch["noise"].double(), batch["u"]
    n = noise.numel()
    assert noise.dtype == torch.float64 and batch["noise"].dtype == torch.float32
    assert abs(noise.mean()) < 6 / n**0.5
    assert abs(noise.var() - 1) < 6 * (2 / n) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 6 / n**0.5
    assert abs(u.mean() - 0.5) < 6 * (1 / 12 / 4000) ** 0.5
    assert u.dtype == torch.float64 and 0 <= u.min() and u.max() < 1
    other = source.samples(seed=6, random_flip=False).__getitems__(list(range(4000)))
    assert abs((noise * other["noise"].double()).mean()) < 6 / n**0.5
    assert abs(torch.corrcoef(torch.stack([u, other["u"]]))[0, 1]) < 6 / 4000**0.5


def test_stratified_times_fill_every_part_of_the_range_once(digits):
    source = ImageSource(digits.select(range(5)), TrainingConfig())
    stratified, plain = (source.samples(0, False, strata) for strata in (8, 1))
    for first in (0, 8, 803):
        numbers = list(range(first, first + 8))
        u = stratified.__getitems__(numbers)["u"]
        assert sorted((u * 8).floor().int().tolist()) == list(range(8))
        # Within its part a sample is where its own random number puts it.
        torch.testing.assert_close((u * 8) % 1.0, plain.__getitems__(numbers)["u"])


def test_a_folder_of_mixed_sizes_modes_and_broken_files(tmp_path, caplog):
    folder = tmp_path / "data"
    for kind, modes in (("cat", ("RGB", "L", "RGBA")), ("dog", ("P", "1", "LA"))):
        (folder / kind).mkdir(parents=True)
        for i, mode in enumerate(modes):
            Image.new(mode, (10 + 3 * i, 12 + 5 * i)).save(folder / kind / f"{i}.png")
    whole = (folder / "cat" / "0.png").read_bytes()
    (folder / "cat" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "empty.jpg").write_bytes(b"")
    options = {"train_data_dir": str(folder), "cache_dir": str(tmp_path / "cache"), "resolution": 8}
    with pytest.raises(ValueError, match="Image 3 of the data set cannot be used.*skip_broken_images"):
        ImageSource(load_images(TrainingConfig(**options)), TrainingConfig(**options))
    config = TrainingConfig(**options, skip_broken_images=True)
    source = ImageSource(load_images(config), config)
    assert len(source) == 6 and source.channels == 3
    assert source.get_many(range(6)).shape == (6, 3, 8, 8)
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [0, 0, 0, 1, 1, 1])
    assert "Left out 2 of 8 images" in caplog.text
    assert "cut.png" in caplog.text and "empty.jpg" in caplog.text
