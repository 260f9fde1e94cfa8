"""Training without the images of ``--data.exclude``."""

import pytest

from crossx.errors import CrossXError
from crossx.evaluation.predictions import Predictions, predictions_path
from crossx.evaluation.run import test_run as run_test
from crossx.runs import Run
from crossx.training.config import Config
from crossx.training.fit import fit, resume


@pytest.mark.slow
def test_a_run_keeps_what_it_left_out(make_config, images, tmp_path):
    file = tmp_path / "out.csv"
    whole = fit(make_config("whole", trainer={"max_epochs": 1}))
    split_of = {}
    for split in ("train", "test"):
        run_test(whole.path, split=split)
        split_of |= dict.fromkeys(listed(whole, split), split)
    left_out = [
        next(path for path, split in split_of.items() if split == wanted) for wanted in ("train", "test")
    ]
    file.write_text("path,reason,detail\n" + "".join(f"{path},blurry,\n" for path in left_out))
    run = fit(make_config(data={"exclude": str(file)}, trainer={"max_epochs": 1}))
    info = run.read_info()
    assert info["images"] == {"train": 26, "val": 3, "test": 5}
    assert info["excluded"] == {"file": str(file), "images": {"train": 1, "val": 0, "test": 1}}
    assert Config.from_yaml(run.config).data.exclude == str(run.excluded)
    assert run.excluded.read_text().split() == ["path", *sorted(left_out)]

    # neither the file nor the place of the run matters any more
    file.unlink()
    moved = Run(run.path.rename(tmp_path / "moved"))
    assert run_test(moved.path)["n"] == 5
    assert left_out[1] not in listed(moved, "test")
    assert resume(moved.path, max_epochs=2).read_info()["images"] == info["images"]


def listed(run, split):
    return [str(path) for path in Predictions.load(predictions_path(run.path, split), run.path, split).paths]


def test_an_unknown_path_stops_before_the_run_folder_is_made(make_config, tmp_path):
    file = tmp_path / "out.csv"
    file.write_text("path\nrobin/999.jpg\n")
    config = make_config(data={"exclude": str(file)})
    with pytest.raises(CrossXError, match=r"'robin/999\.jpg' is not an image of dataset 'folder'"):
        fit(config)
    assert not (tmp_path / "run").exists()
