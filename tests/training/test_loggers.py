import pytest

from crossx.errors import UsageError
from crossx.training.config import TrainerConfig
from crossx.training.loggers import check_loggers


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_logger_that_is_not_installed_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loggers(["csv"])
    assert TrainerConfig().loggers == []
    with pytest.raises(UsageError) as refused:
        check_loggers(["csv", name])
    assert str(refused.value) == f"logger {name!r} needs {name}: pip install 'crossx[{name}]'."
