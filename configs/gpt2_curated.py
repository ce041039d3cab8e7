"""
GPT-2 124M on the chunks that curate.py kept of the run of gpt2_inrun.py: the same model, batch and schedule, not valued again.

    python train.py config/gpt2_inrun.py
    python curate.py out/gpt2_inrun --drop=negative
    python train.py config/gpt2_curated.py

Machine: as gpt2_inrun.py. Not run in full by this project yet; small ones, with their controls, are in results/*_curation.
Expected: whether it beats `--keep=` as many chunks at random (curate.py --random) is what to look at; beside all chunks it also has fewer of them.
"""

from configs.gpt2_inrun import *  # noqa: F403

keep = "out/gpt2_inrun/keep.npy"
rule = "off"
