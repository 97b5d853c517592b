import numpy as np
import pytest
import torch
from PIL import Image
from runs import photos
from torch.utils.data import Subset, TensorDataset

import fastntk
from fastntk.inputs.batches import batches, digests, labels_of, labels_offered
from fastntk.inputs.images import Preprocessing, in_memory
from fastntk.inputs.libraries import datasets
from fastntk.inputs.sources import load_data

PLAIN = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pixels(count, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_npz_gives_normalised_images(tmp_path):
    x, y = pixels(3), np.array([0, 1, 1])
    np.savez(tmp_path / "d.npz", x=x, y=y, classes=np.array(["cat", "dog"]))
    data = load_data(str(tmp_path / "d.npz"), PLAIN)
    image, label = data[2]
    assert label == 1
    assert data.classes == ["cat", "dog"]
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), x[2] / 127.5 - 1, atol=1e-6)


def test_npz_with_splits_and_grey_images(tmp_path):
    np.savez(
        tmp_path / "d.npz", x_train=pixels(4)[..., 0], y_train=[0, 1, 0, 1], x_test=pixels(2)[..., 0], y_test=[1, 0]
    )
    train, test = (load_data(str(tmp_path / "d.npz"), PLAIN, split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    image = train[0][0]
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])


def folder(path):
    for c, name in enumerate(("apple", "pear")):
        (path / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(pixels(1, 12, 3 * c + i)[0]).save(path / name / f"{i}.png")
    return path


def test_folder_of_class_folders(tmp_path):
    data = load_data(str(folder(tmp_path)), PLAIN)
    assert data.classes == ["apple", "pear"]
    assert labels_of(data).tolist() == [0, 0, 0, 1, 1, 1]
    assert data[5][0].shape == (3, 8, 8)


def test_image_that_does_not_decode_is_named(tmp_path):
    broken = folder(tmp_path) / "pear" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(fastntk.InputError, match=r"pear/1.png does not decode"):
        in_memory(load_data(str(tmp_path), PLAIN))


def test_torchvision_dataset_by_name(tmp_path):
    from fastntk.inputs.libraries import torchvision

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = pixels(5, 28)[..., 0], np.array([0, 1, 2, 9, 4], dtype=np.uint8)
        header = np.array([2051, 5, 28, 28], dtype=">i4").tobytes()
        (tmp_path / "MNIST/raw" / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (tmp_path / "MNIST/raw" / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([2049, 5], dtype=">i4").tobytes() + labels.tobytes()
        )
    data = load_data("MNIST", PLAIN, root=tmp_path)
    assert labels_of(data).tolist() == [0, 1, 2, 9, 4]
    assert data[3][0].shape == (3, 8, 8)
    assert torchvision().datasets.MNIST(tmp_path, train=False).targets.tolist() == [0, 1, 2, 9, 4]
    with pytest.raises(fastntk.InputError, match="cannot open CIFAR10 under"):
        load_data("CIFAR10", PLAIN, root=tmp_path)
    with pytest.raises(fastntk.InputError, match="needs the folder"):
        load_data("CIFAR10", PLAIN)


def test_memory_copy_is_the_same_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=pixels(5, 12), y=[0, 1, 2, 0, 1])
    data = load_data(str(tmp_path / "d.npz"), PLAIN)
    copy = in_memory(data)
    assert isinstance(copy, TensorDataset)
    assert all(torch.equal(copy[i][0], data[i][0]) and copy[i][1] == data[i][1] for i in range(5))
    assert in_memory(data, limit=10) is data


def test_labels_and_batches_of_any_dataset():
    data = TensorDataset(torch.arange(4.0)[:, None], torch.tensor([3, 1, 0, 2]))
    assert labels_of(Subset(data, [2, 0])).tolist() == [0, 3]
    assert torch.cat([labels for _, labels in batches(data, 3)]).tolist() == [3, 1, 0, 2]
    shuffled = [
        torch.cat([y for _, y in batches(data, 3, torch.Generator().manual_seed(1))]).tolist() for _ in range(2)
    ]
    assert shuffled[0] == shuffled[1]
    assert sorted(shuffled[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(2)}, "no array 'x_train'; it holds images"),
        ({"x": pixels(2).astype(float), "y": [0, 1]}, "must be uint8"),
        ({"x": pixels(2)[:, 0, 0], "y": [0, 1]}, r"not uint8 \[2, 3\]"),
        ({"x": pixels(2), "y": [0, 1, 1]}, "one integer label an image"),
        ({"x": pixels(2), "y": [0.5, 1.0]}, "one integer label"),
        ({"x": pixels(2), "y": [0, -1]}, "label -1 is outside"),
        ({"x": pixels(2), "y": [0, 2], "classes": ["a", "b"]}, "label 2 is outside the 2 classes"),
    ],
)
def test_bad_arrays(arrays, message, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(fastntk.InputError, match=message):
        load_data(str(tmp_path / "d.npz"), PLAIN)


def test_bad_sources(tmp_path):
    np.savez(tmp_path / "d.npz", x=pixels(20), y=[0] * 20)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:500])
    with pytest.raises(fastntk.InputError, match=r"cut.npz cannot be read"):
        load_data(str(tmp_path / "cut.npz"), PLAIN)
    with pytest.raises(fastntk.InputError, match="there is no file"):
        load_data(str(tmp_path / "none.npz"), PLAIN)
    with pytest.raises(fastntk.InputError, match="neither a folder"):
        load_data("CIFAR11", PLAIN)
    with pytest.raises(fastntk.InputError, match="has no class folders in it"):
        load_data(str(tmp_path), PLAIN)


def stored(path, names):
    """A Hugging Face dataset on disk: images, classes, names."""
    library = datasets()
    features = {
        "picture": library.Image(),
        "kind": library.ClassLabel(names=["cat", "dog"]),
        "name": library.Value("string"),
    }
    rows = {"picture": [Image.fromarray(each) for each in pixels(len(names))], "kind": [0, 1, 1], "name": names}
    return library.Dataset.from_dict(rows, library.Features(features))


def test_hugging_face_datasets(tmp_path):
    whole = stored(tmp_path, ["b", "a", "c"])
    whole.save_to_disk(str(tmp_path / "plain"))
    datasets().DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "split"))
    for name in ("plain", "split"):
        data = load_data(str(tmp_path / name), PLAIN, id_column="name")
        assert (data.classes, data.labels.tolist(), list(data.ids)) == (["cat", "dog"], [0, 1, 1], ["b", "a", "c"])
        np.testing.assert_allclose(data[2][0].permute(1, 2, 0).numpy(), pixels(3)[2] / 127.5 - 1, atol=1e-6)
    assert list(load_data(str(tmp_path / "plain"), PLAIN).ids) == [0, 1, 2]
    with pytest.raises(fastntk.InputError, match="no split 'test'; it holds train"):
        load_data(str(tmp_path / "split"), PLAIN, split="test")
    with pytest.raises(fastntk.InputError, match="no column 'x'; it holds picture, kind, name"):
        load_data(str(tmp_path / "plain"), PLAIN, id_column="x")
    whole.remove_columns("kind").save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(fastntk.InputError, match="needs one ClassLabel column, not 0. .* class_encode_column"):
        load_data(str(tmp_path / "unlabelled"), PLAIN)


def test_ids_from_a_column_name_each_sample_once(tmp_path):
    np.savez(tmp_path / "d.npz", x=pixels(3), y=[0, 1, 0], who=["u7", "u8", "u9"], number=[10, 20, 10])
    assert list(load_data(str(tmp_path / "d.npz"), PLAIN, id_column="who").ids) == ["u7", "u8", "u9"]
    with pytest.raises(fastntk.InputError, match="the id 10 occurs more than once"):
        load_data(str(tmp_path / "d.npz"), PLAIN, id_column="number")
    with pytest.raises(fastntk.InputError, match="has no array 'when'"):
        load_data(str(tmp_path / "d.npz"), PLAIN, id_column="when")
    with pytest.raises(fastntk.InputError, match="has no columns"):
        load_data(str(folder(tmp_path / "f")), PLAIN, id_column="who")


def test_folders_that_are_no_classes(tmp_path):
    """What begins with a dot, and splits."""
    preprocessing = fastntk.Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
    data = photos(tmp_path / "plain", "anna", "bert", ".ipynb_checkpoints")
    assert load_data(str(data), preprocessing).classes == ["anna", "bert"]
    photos(tmp_path / "both" / "train", "anna", "bert")
    photos(tmp_path / "both" / "val", "anna", "bert", count=1)
    train, test = (load_data(str(tmp_path / "both"), preprocessing, split=split) for split in ("train", "test"))
    assert (train.classes, len(train), len(test)) == (["anna", "bert"], 6, 2)
    assert train.ids[0] == "train/anna/0.png"
    assert str(train) == "6 images in 2 classes: anna 3, bert 3"


def test_data_under_the_classes_of_a_model(tmp_path):
    preprocessing = fastntk.Preprocessing(8, (0.5,) * 3, (0.5,) * 3)
    found = load_data(str(photos(tmp_path / "a", "anna", "carl")), preprocessing).under(["anna", "bert", "carl"])
    assert found.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert "1 classes have none" in str(found)
    with pytest.raises(fastntk.InputError, match="does not know: carl"):
        found.under(["anna", "bert"])


def test_images_of_any_dtype_are_known_again():
    images = torch.randn(4, 3, 5, 5)
    images[3] = images[1]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            data = TensorDataset(images.to(dtype).contiguous(memory_format=layout), torch.arange(4))
            found = digests(data, range(4), 3)
            assert found[1] == found[3]
            assert len(set(found.tolist())) == 3
            assert torch.equal(found, digests(TensorDataset(images.to(dtype), torch.arange(4)), range(4), 2))


class Relabelled(Subset):
    """Some classes of a dataset, numbered anew."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image, int(label) - 2

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_labels_are_those_of_the_items_whatever_is_beneath():
    data = Relabelled(TensorDataset(torch.zeros(4, 3, 2, 2), torch.tensor([2, 3, 2, 3])), [1, 2])
    assert labels_of(data).tolist() == [data[0][1], data[1][1]] == [1, 0]


def test_torchvisions_own_labels_are_offered_where_nothing_changes_them(tmp_path):
    from fastntk.inputs.libraries import torchvision

    for label in "abb":
        place = tmp_path / label / f"{len(list(tmp_path.rglob('*.png')))}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(place)
    kind = torchvision().datasets.ImageFolder

    class Own(kind):
        """A user's, whose items may have others."""

    assert labels_offered(kind(tmp_path)).tolist() == [0, 1, 1]
    assert labels_offered(Subset(kind(tmp_path), [2, 0])).tolist() == [1, 0]
    assert labels_offered(kind(tmp_path, transform=lambda image: image)).tolist() == [0, 1, 1]
    for other in (kind(tmp_path, target_transform=lambda label: 1 - label), Own(tmp_path), [(0, 1)]):
        assert labels_offered(other) is None
    edited = kind(tmp_path)
    edited.samples, edited.targets = [(edited.samples[2][0], 0), *edited.samples[:2]], [5, 5, 5]
    assert labels_offered(edited).tolist() == [edited[place][1] for place in range(3)] == [0, 0, 1]
    joint = kind(tmp_path)
    joint.transforms = lambda image, label: (image, 1 - label)
    assert labels_offered(joint) is None
