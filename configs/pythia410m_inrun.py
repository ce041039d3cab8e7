"""
Pythia-410M on the Pile, every chunk valued in the run.

The second model of "Data Shapley in One Training Run" (arXiv 2406.11011), with the settings of its
first: the paper gives one set.

    python prepare_pile.py --tokenizer=models/pythia-410m/tokenizer.json --data_dir=data/pile-neox
    python train.py configs/pythia410m_inrun.py

Machine: made for one GPU with 80 GB. This project has not run it.
Expected: out/pythia410m_inrun/values.npy with a value for each chunk used.
"""

from configs.gpt2_inrun import *  # noqa: F403

data_dir = "data/pile-neox"
n_layer, n_head, n_embd = 24, 16, 1024
bias = True
tie_weights = False
rotary_pct = 0.25
parallel_residual = True
vocab_size = 50304  # as published: the tokenizer's 50,277, rounded up
