"""
A small GPT for a first look at a corpus, on a laptop's CPU: any prepared data, any tokenizer.

    python prepare_pile.py --source=mine.jsonl --data_dir=data/mine
    python train.py configs/small.py --data_dir=data/mine

Machine: two CPU cores, 2 GB of memory, 0.3 GB of disk.
Time: a quarter of an hour for chunks of 1,024 GPT-2 tokens, whose vocabulary is most of the work;
a minute for chunks of 256 bytes. The run says how long it will take after its third step. (These
are extrapolated from the processor time of 20 steps; the run was not timed as a whole.)
Expected: 800 chunks with a value, enough to compare the medians of a few domains. The model has
0.8 million weights beside its vocabulary and has only begun to learn. --max_iters=1000 sees more.
"""

batch_size = 8
n_layer, n_head, n_embd = 4, 4, 128
max_iters = 100
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 30

rule = "adamw2"  # at such rates most steps of `adamw` would need two passes too
targets = "val"
target_batch = 4
book_interval = 10

eval_interval = 50
eval_chunks = 4
log_interval = 10
checkpoint_interval = 50
