"""
A small GPT on the text every Python installation carries, for a CPU: two targets of different kinds.

    python prepare_pile.py --source=python --tokenizer=byte --block_size=256 --val_fraction=0.05 --data_dir=data/python
    python train.py config/demo.py

Machine: two CPU cores, about two minutes.
Expected: validation loss about 2.7 nats a byte, falling; a code target is helped most by code, by median; the books close to a fifth or better;
the audited step agrees with its exact Shapley values.
"""

data_dir = "data/python"
batch_size = 8
n_layer, n_head, n_embd = 4, 4, 160
max_iters = 100
learning_rate = 1e-3  # at 2e-3 single warm-up steps of momentum alone cost a target whole nats, and no book closes on those
min_lr = 1e-4
warmup_iters = 30

rule = "adamw2"
book_interval = 10
audit_interval = 100
targets = "val:Python code,val:Topics"
target_batch = 1

eval_interval = 50
eval_chunks = 12
log_interval = 20
checkpoint_interval = 50
