"""
A small GPT for a first look at a corpus, on a laptop's CPU: any prepared data, any tokenizer.

    python prepare_pile.py --source=mine.jsonl --data_dir=data/mine
    python train.py configs/small.py --data_dir=data/mine

Machine: two CPU cores and 2 GB of memory.
"""

batch_size = 8
n_layer, n_head, n_embd = 4, 4, 128
max_iters = 200
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20

rule = "adamw"
targets = "val"
target_batch = 4
book_interval = 10

eval_interval = 50
eval_chunks = 4
log_interval = 10
checkpoint_interval = 50
