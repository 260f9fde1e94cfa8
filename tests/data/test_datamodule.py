import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossx.data.catalog import read_dataset
from crossx.data.config import DataConfig
from crossx.data.datamodule import DataModule
from crossx.data.images import read_image
from crossx.data.index import DatasetIndex, Record
from crossx.data.transforms import Normalize, eval_transform
from crossx.errors import CrossXError
from crossx.runs import Preprocessing
from slow import slow_except

PREPROCESSING = Preprocessing(32, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_index(folder, train=(4, 4, 4), test=(2, 1, 2), val=()):
    random = np.random.default_rng(0)
    records = []
    for split, counts in (("train", train), ("val", val), ("test", test)):
        for label, count in enumerate(counts):
            for number in range(count):
                path = folder / f"{split}_{label}_{number}.png"
                Image.fromarray(random.integers(0, 256, (36, 40, 3), dtype=np.uint8)).save(path)
                records.append(Record(path, label, split))
    return DatasetIndex("birds", ("auk", "bittern", "crow"), tuple(records))


def make(index, seed=0, **options):
    options = {"image_size": 32, "batch_size": 4, "num_workers": 0, "val_fraction": 0.25, **options}
    return DataModule(index, PREPROCESSING, DataConfig(**options), seed)


def targets_of(loader):
    return Counter(label for _, targets in loader for label in targets.tolist())


def test_validation_is_split_off_once(tmp_path):
    index = make_index(tmp_path)
    data = make(index, batch_size=3)
    assert targets_of(data.train_dataloader()) == {0: 3, 1: 3, 2: 3}
    assert targets_of(data.val_dataloader()) == {0: 1, 1: 1, 2: 1}
    again = make(index.with_validation(0.25))
    assert again.index == data.index


def test_trainval_trains_on_both_and_validates_on_none(tmp_path):
    data = make(make_index(tmp_path, val=(1, 2, 3)), train_on="trainval")
    assert targets_of(data.train_dataloader()) == {0: 5, 1: 6, 2: 7}
    assert data.val_dataloader() == []


def test_without_held_out_images_there_is_no_validation(tmp_path):
    assert make(make_index(tmp_path), val_fraction=0.0).val_dataloader() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_come_in_the_order_of_records(tmp_path, num_workers):
    index = make_index(tmp_path)
    data = make(index, num_workers=num_workers, eval_batch_size=2)
    transform = eval_transform(PREPROCESSING)
    batches = list(data.test_dataloader())
    assert [len(targets) for _, targets in batches] == [2, 2, 1]
    images, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    records = index.split("test")
    assert targets.tolist() == [record.label for record in records]
    assert torch.equal(images, torch.stack([transform(read_image(record.path)) for record in records]))


def test_batches_travel_as_bytes_and_reach_the_network_as_floats(tmp_path):
    data = make(make_index(tmp_path), num_workers=2)
    batch = next(iter(data.test_dataloader()))
    assert batch[0].dtype == torch.uint8
    assert batch[0].is_contiguous(memory_format=torch.channels_last)
    images, targets = data.to_device(batch, torch.device("cpu"))
    assert images.dtype == torch.float32
    assert torch.equal(images, Normalize(PREPROCESSING)(batch[0]))
    assert torch.equal(targets, batch[1])


def test_a_lone_last_image_is_left_out_of_training(tmp_path):
    index = make_index(tmp_path, train=(3, 3, 3))
    sizes = {
        batch_size: [
            len(targets)
            for _, targets in make(index, batch_size=batch_size, val_fraction=0).train_dataloader()
        ]
        for batch_size in (1, 2, 4, 5, 8, 9, 16)
    }
    assert sizes == {1: [1] * 9, 2: [2] * 4, 4: [4, 4], 5: [5, 4], 8: [8], 9: [9], 16: [9]}


def test_balanced_sampling_reaches_the_loader(tmp_path):
    data = make(make_index(tmp_path, train=(30, 2, 2)), val_fraction=0, sampling="balanced")
    loader = data.train_dataloader()
    drawn = Counter()
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        drawn += targets_of(loader)
    assert min(drawn.values()) > 0.2 * drawn.total()


def break_images(tmp_path):
    (tmp_path / "train_0_0.png").write_bytes(b"")
    (tmp_path / "train_1_1.png").unlink()
    whole = (tmp_path / "test_2_0.png").read_bytes()
    (tmp_path / "test_2_0.png").write_bytes(whole[: len(whole) // 2])


def test_a_table_whose_images_are_all_elsewhere_names_its_folder(tmp_path):
    for name in ("pictures", "results"):
        (tmp_path / name).mkdir()
    index = make_index(tmp_path / "pictures")
    rows = [f"{Path(r.path).name},{index.classes[r.label]},{r.split}" for r in index.records]
    table = tmp_path / "results" / "predictions.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    data = make(read_dataset("table", table), dataset="table", root=str(table))
    with pytest.raises(CrossXError) as error:
        data.check_images()
    assert f"{table.parent / 'train_0_0.png'}: no such file" in str(error.value)
    assert str(error.value).endswith(
        f"The paths of a table are relative to its folder, {table.parent}: move it, or write absolute paths."
    )
    moved = Path(shutil.copy(table, tmp_path / "pictures"))
    make(read_dataset("table", moved), dataset="table", root=str(moved)).check_images()
    (tmp_path / "pictures" / "train_0_0.png").unlink()
    with pytest.raises(CrossXError, match="Replace them, or leave them out"):
        make(read_dataset("table", moved), dataset="table", root=str(moved)).check_images()


def test_bad_images_stop_with_a_list(tmp_path):
    data = make(make_index(tmp_path))
    break_images(tmp_path)
    with pytest.raises(CrossXError) as error:
        data.check_images()
    message = str(error.value)
    assert message.startswith("3 of 17 images cannot be read: ")
    for name, reason in (("train_0_0", "empty"), ("train_1_1", "no such file"), ("test_2_0", "")):
        assert f"{tmp_path / name}.png: " in message
        assert reason in message
    assert "--data.bad_images skip" in message
    assert "\n" not in message
    with pytest.raises(CrossXError, match=r"^1 of 5 images .* Replace them\.$"):
        data.check_images(("test",))


def test_long_list_of_bad_images_is_cut(tmp_path):
    data = make(make_index(tmp_path))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(CrossXError, match="and 7 more") as error:
        data.check_images()
    assert str(error.value).count("is empty") == 10


def test_bad_images_are_skipped_and_reported(tmp_path, caplog):
    data = make(make_index(tmp_path, test=(2, 1, 2)), bad_images="skip", val_fraction=0)
    break_images(tmp_path)
    data.check_images()
    assert {path.name for path, _ in data.skipped} == {"train_0_0.png", "train_1_1.png", "test_2_0.png"}
    assert all(reason for _, reason in data.skipped)
    assert "3 of 17 images cannot be read and are left out: " in caplog.text
    assert all(f"{path}: {reason}" in caplog.text for path, reason in data.skipped)
    assert targets_of(data.train_dataloader()) == {0: 3, 1: 3, 2: 4}
    assert targets_of(data.test_dataloader()) == {0: 2, 1: 1, 2: 1}


def test_good_images_pass_the_check(tmp_path):
    data = make(make_index(tmp_path))
    before = data.index
    data.check_images()
    assert data.index == before
    assert data.skipped == []


def test_class_that_loses_its_last_training_image_is_told(tmp_path):
    data = make(make_index(tmp_path, train=(1, 4, 4)), bad_images="skip", val_fraction=0)
    break_images(tmp_path)
    data.check_images()
    with pytest.raises(
        CrossXError, match=r"1 of 3 classes have no training image \(3 unreadable .*: 'auk'\."
    ):
        data.train_dataloader()


def test_class_only_in_test_is_told(tmp_path):
    with pytest.raises(CrossXError, match=r"'birds'.* 1 of 3 classes .*'bittern'"):
        make(make_index(tmp_path, train=(2, 0, 2))).train_dataloader()


def test_empty_split_is_told(tmp_path):
    with pytest.raises(CrossXError, match=r"no test images; it has: train, val\."):
        make(make_index(tmp_path, test=())).test_dataloader()


def test_workers_are_the_usable_cores_at_most_eight(tmp_path, monkeypatch):
    data = make(make_index(tmp_path), num_workers=None)
    for cores, expected in ((1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert data.num_workers == expected
    data.processes = 16
    assert data.num_workers == 4
    assert make(make_index(tmp_path), num_workers=0).num_workers == 0


def test_loaders_leave_the_global_generator_alone(tmp_path):
    data = make(make_index(tmp_path), num_workers=1)
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def read_epochs(loader, first, last, *, first_batch=0):
    """Read training batches as the loop does: epoch, checksum and targets of each."""
    seen = []
    for epoch in range(first, last):
        loader.sampler.set_epoch(epoch, first_batch if epoch == first else 0)
        seen += [(epoch, images.double().sum().item(), targets.tolist()) for images, targets in loader]
    return seen


@pytest.mark.parametrize("sampling", ["uniform", "balanced", "pairs"])
@pytest.mark.parametrize("num_workers", slow_except([0, 2], 0))
@pytest.mark.parametrize("batches", [4, 5])
def test_resumed_training_sees_the_same_batches(tmp_path, num_workers, batches, sampling):
    """Stopped between two epochs, and within one."""
    index = make_index(tmp_path)
    options = {"augmentation": "crop", "sampling": sampling}
    loader = make(index, **options).train_dataloader()
    whole = read_epochs(loader, 0, 4)
    an_epoch = len(loader)
    assert an_epoch > 1
    assert len({checksum for _, checksum, _ in whole}) == len(whole) == 4 * an_epoch
    epoch, batch = divmod(batches, an_epoch)
    loader = make(index, num_workers=num_workers, **options).train_dataloader()
    assert read_epochs(loader, epoch, 4, first_batch=batch) == whole[batches:]
    # a loader whose workers live on, as within one process
    assert read_epochs(loader, 1, 2, first_batch=1) == whole[an_epoch + 1 : 2 * an_epoch]
