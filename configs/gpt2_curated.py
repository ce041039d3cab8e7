"""
GPT-2 124M on the chunks that curate.py kept of the run of gpt2_inrun.py.

The model, the batch and the schedule are the same. The chunks are not valued again.

    python train.py configs/gpt2_inrun.py
    python curate.py out/gpt2_inrun --drop=negative
    python train.py configs/gpt2_curated.py

Machine: as gpt2_inrun.py. This project has not run it in full; results/curation has small runs with
their controls.
Expected: compare it with a run on as many chunks at random (curate.py --random, then --keep=...).
Against a run on all chunks it also differs in having fewer of them.
"""

from configs.gpt2_inrun import *  # noqa: F403

keep = "out/gpt2_inrun/keep.npy"
rule = "off"
