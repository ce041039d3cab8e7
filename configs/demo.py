"""
A small GPT on the text every Python installation carries, for a CPU: two targets of two kinds.

    make demo

is the same as

    python prepare_pile.py --source=python --tokenizer=byte --block_size=256 \\
        --val_fraction=0.05 --data_dir=data/python
    python train.py configs/demo.py

Machine: two CPU cores, about two minutes.
Expected: the validation loss falls to about 2.6 nats a byte. A code target is helped most by code,
by median value. The books account for the drop of the loss within a fifth. The audited step agrees
with its exact Shapley values.
"""

data_dir = "data/python"
batch_size = 8
n_layer, n_head, n_embd = 4, 4, 160
max_iters = 100
# at 1e-3, momentum alone cost a target half a nat in a step at the end of the warm-up, on the text
# of one installation: no book closes on such a step
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 30

rule = "adamw2"
book_interval = 10
audit_interval = 100
targets = "val:Python code,val:Topics"
target_batch = 4  # with 1, noise turns the sign of every tenth chunk of code

eval_interval = 50
eval_chunks = 12
log_interval = 20
checkpoint_interval = 50
