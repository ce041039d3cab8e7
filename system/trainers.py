"""Folders that trainer.py wrote: their model and checkpoints are transformers'."""

from pathlib import Path

from system.errors import UserError
from system.files import read_json

MADE_BY = "trainer.py"  # in config.json
CURE = "trainer.train(resume_from_checkpoint=True) goes on with it"


def is_trainers(folder):
    """Whether trainer.py wrote a run's folder."""
    try:
        about = read_json(Path(folder, "config.json"), "", {"made_by": str}, unsealed=True)
    except UserError:
        return False
    return about["made_by"] == MADE_BY


def refuse_trainers(folder, what):
    """Raises UserError where trainer.py wrote a folder. what: why that matters."""
    if is_trainers(folder):
        raise UserError(f"{folder} has the values of a ValuationTrainer, {what}: {CURE}")
