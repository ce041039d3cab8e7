import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernel's tests; read when ghost.py is imported
torch.set_num_threads(1)  # the tests run side by side
os.environ["OMP_NUM_THREADS"] = "1"  # and so do the programs they start
MEMORY = "/dev/shm"  # files that need no disk: a run waits until each of its own is written
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:  # they need a tenth
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell starts `pytest &` with Ctrl-C ignored, which its processes would inherit


def pytest_xdist_auto_num_workers(config):
    """For -n auto. One more than there are cores: some tests mostly wait."""
    return os.cpu_count() + 1


@pytest.fixture(scope="session")
def python_data(tmp_path_factory):
    """A prepared folder of real text: chunks of 32 bytes in the three domains that do not depend
    on which packages are installed."""
    from prepare_pile import Config, prepare

    path = tmp_path_factory.mktemp("data") / "python"
    options = dict(
        source="python",
        domains="Python code,Docstrings,Topics",
        tokenizer="byte",
        block_size=32,
        val_fraction=0.3,
        limit_tokens=600_000,
    )
    prepare(Config(**options, data_dir=str(path), workers=1))
    return path


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed("top", folder, "--n=3") -> what values.py prints."""

    import config  # once the path above is set
    import values

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["values.py", *map(str, argv)])
        capsys.readouterr()
        config.main(values.main)
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(typed, capsys):
    """The one line that a command leaves on stderr when it ends with exit code 2."""

    def call(*argv):
        with pytest.raises(SystemExit) as stop:
            typed(*argv)
        out, err = capsys.readouterr()
        assert stop.value.code == 2, err
        assert not out
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, err
        return err

    return call
