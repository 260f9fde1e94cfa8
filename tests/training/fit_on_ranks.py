"""Run as a script on each rank: train each configuration of a folder; ``stopped`` and ``within`` are resumed.

Further arguments are modules with methods to register.
"""

import importlib
import sys
from pathlib import Path

import pytest
from test_resume import crash, interrupt

from crossx.training.config import Config
from crossx.training.fit import fit, resume

if __name__ == "__main__":
    for module in sys.argv[2:]:
        importlib.import_module(module).register()
    for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
        config = Config.from_yaml(path)
        if path.stem in ("stopped", "within"):
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, 6, crash)
                with pytest.raises(RuntimeError, match="power cut"):
                    fit(config)
            resume(config.run_path())
        else:
            fit(config)
