"""
GPT-2 124M on the Pile, every chunk valued in the run.

This is the run of "Data Shapley in One Training Run" (arXiv 2406.11011).

    python prepare_pile.py
    python train.py configs/gpt2_inrun.py

Machine: made for one GPU with 80 GB, and 5 GB of disk. This project has not run it in full
(results/README.md). On a CPU it would take years: begin with configs/small.py.
Expected: what nanoGPT reaches at this batch size, and out/gpt2_inrun/values.npy with a value for
each chunk used.
"""

block_size = 1024
batch_size = 16
gradient_accumulation_steps = 1
n_layer, n_head, n_embd = 12, 12, 768
bias = False
dropout = 0.0

optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
beta1, beta2 = 0.9, 0.95
weight_decay = 0.1
grad_clip = 1.0
warmup_iters = 2000
max_iters = 500000

rule = "adamw"
targets = "val"
# a fifth of a step's time less than 4: domains are as sure, single chunks less (docs/questions.md)
target_batch = 1

eval_interval = 1000
log_interval = 10
checkpoint_interval = 1000
