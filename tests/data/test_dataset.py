import contextlib
import errno
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from crossx.data.dataset import ImageDataset, ImageLoader
from crossx.data.images import ImageError, read_image
from crossx.data.index import Record
from crossx.data.sampler import Draw, EpochSampler
from crossx.data.transforms import train_transform
from crossx.errors import CrossXError
from crossx.runs import Preprocessing

PREPROCESSING = Preprocessing(32, None, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    made = []
    for number in range(10):
        path = folder / f"{number}.png"
        Image.fromarray(random.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
        made.append(Record(path, number % 3, "train"))
    return made


@pytest.fixture
def dataset(records):
    return ImageDataset(records, train_transform(PREPROCESSING, "trivial", random_erasing=0.3), seed=7)


def test_item_is_the_transformed_image_and_its_label(records):
    plain = ImageDataset(records, lambda image: image.float())
    assert len(plain) == 10
    image, label = plain[4]
    assert torch.equal(image, read_image(records[4].path).float())
    assert label == 1


def test_augmentation_depends_on_seed_and_draw_alone(dataset, records):
    first = dataset[Draw(2, 5)][0]
    torch.manual_seed(99)
    dataset[Draw(0, 1)]
    assert torch.equal(dataset[Draw(2, 5)][0], first)
    assert torch.equal(ImageDataset(records, dataset.transform, seed=7)[Draw(2, 5)][0], first)
    others = [dataset[Draw(3, 5)][0], dataset[Draw(2, 5, repeat=1)][0], dataset[Draw(2, 6)][0]]
    others.append(ImageDataset(records, dataset.transform, seed=8)[Draw(2, 5)][0])
    assert not any(torch.equal(other, first) for other in others)


def test_plain_index_is_epoch_zero(dataset):
    assert torch.equal(dataset[3][0], dataset[Draw(0, 3)][0])


def test_global_generator_is_left_alone(dataset):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dataset[Draw(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generator_is_restored_after_a_failure(records):
    def fail(image):
        torch.rand(1)
        raise CrossXError("too small")

    before = torch.get_rng_state()
    with pytest.raises(CrossXError, match=rf"^{records[0].path}: too small$"):
        ImageDataset(records, fail)[0]
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_do_not_depend_on_workers_or_on_how_they_live(dataset):
    def epochs(num_workers, persistent, wanted):
        sampler = EpochSampler([record.label for record in dataset.records], seed=7)
        loader = ImageLoader(
            dataset, 4, sampler=sampler, num_workers=num_workers, persistent_workers=persistent
        )
        batches = []
        for epoch in wanted:
            sampler.set_epoch(epoch)
            batches += list(loader)
        return batches

    alone = epochs(0, False, [0, 1, 2])
    assert len(alone) == 9
    assert not torch.equal(alone[0][0], alone[3][0])
    for other in (epochs(2, True, [0, 1, 2]), epochs(2, False, [0, 1, 2])):
        for (images, targets), (same_images, same_targets) in zip(alone, other, strict=True):
            assert torch.equal(images, same_images)
            assert torch.equal(targets, same_targets)
    for (images, _), (same_images, _) in zip(alone[6:], epochs(2, True, [2]), strict=True):
        assert torch.equal(images, same_images)


def test_loader_draws_nothing_before_the_first_batch(dataset):
    sampler = EpochSampler([0] * 10, seed=7)
    loader = ImageLoader(dataset, 10, sampler=sampler, num_workers=1)
    started_early = iter(loader)
    sampler.set_epoch(3)
    images, _ = next(started_early)
    expected = torch.stack([dataset[draw][0] for draw in sampler])
    assert torch.equal(images, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("broken", [b"", b"no image", None])
def test_unreadable_image_is_one_line_from_workers_too(records, tmp_path, num_workers, broken):
    path = tmp_path / "broken: image\u2028é.jpg"
    if broken is not None:
        path.write_bytes(broken)
    dataset = ImageDataset([*records, Record(path, 0, "train")], lambda image: image.float())
    with pytest.raises(ImageError) as expected:
        read_image(path)
    with pytest.raises(ImageError) as error:
        list(ImageLoader(dataset, 4, num_workers=num_workers))
    assert str(error.value) == str(expected.value)


def test_programming_errors_keep_their_traceback(records):
    def fail(image):
        return image / "x"

    with pytest.raises(TypeError, match=r"Original Traceback[\s\S]*in fail"):
        list(ImageLoader(ImageDataset(records, fail), 4, num_workers=1))


def test_workers_end_with_the_error(records):
    def fail(image):
        raise CrossXError("broken")

    with pytest.raises(CrossXError):
        list(ImageLoader(ImageDataset(records, fail), 2, num_workers=2))
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]


SHARED = "too little shared memory (/dev/shm) for --data.num_workers 2: give more (docker run --shm-size 2g), or load"
FILES = "too many open files for --data.num_workers 2: raise the limit (ulimit -n 65536), or load the images without"
PROCESSES = "the processes of --data.num_workers 2 cannot be started: give fewer, or load the images without processes"
TRACEBACK = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError(TRACEBACK + "unable to write to file </torch_9_1>: No space left on device (28)"),
            SHARED,
        ),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_9_1>: No space left (28)"),
            SHARED,
        ),
        (
            RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error. It is possible that ..."),
            SHARED,
        ),
        (RuntimeError("unable to mmap 99 bytes from file </torch_9_1>: Cannot allocate memory (12)"), SHARED),
        (OSError(errno.ENOSPC, "No space left on device"), SHARED),
        (OSError(errno.ENOSYS, "Function not implemented"), SHARED),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), SHARED),
        (PermissionError(errno.EACCES, "Permission denied"), SHARED),
        (OSError(errno.EMFILE, "Too many open files"), FILES),
        (RuntimeError("unable to open shared memory object </torch_9_1>: Too many open files (24)"), FILES),
        (RuntimeError("received 0 items of ancdata"), FILES),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), PROCESSES),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), PROCESSES),
    ],
)
def test_a_limit_of_the_machine_is_one_line(dataset, monkeypatch, error, message):
    def start(loader):
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", start)
    with pytest.raises(CrossXError) as raised:
        list(ImageLoader(dataset, num_workers=2))
    assert str(raised.value).startswith(message)
    assert str(raised.value).endswith(" without processes: --data.num_workers 0.")
    assert raised.value.__suppress_context__


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), ValueError("shared memory"), OSError(5, "I/O error")]
)
def test_other_errors_of_workers_are_left_alone(dataset, monkeypatch, error):
    def start(loader):
        raise error

    monkeypatch.setattr(DataLoader, "__iter__", start)
    with pytest.raises(type(error), match=str(error.args[-1])):
        list(ImageLoader(dataset, num_workers=2))


LOOP = """
import sys, time
import torch
from crossx.data.dataset import ImageLoader
from crossx.errors import sigterm_interrupts

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        if index >= 16:
            time.sleep(1000)  # as of a file system that does not answer
        return torch.zeros(1), 0

loader = ImageLoader(Images(), 4, num_workers=2, persistent_workers=True)
with sigterm_interrupts():
    try:
        for _ in loader:
            print("batch", flush=True)
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_is_left_to_the_program(number):
    words = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler){LOOP}"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "batch\n"
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert out.splitlines()[-1] == "stopped"
    assert err == ""
    assert process.returncode == 0
