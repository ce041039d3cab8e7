"""
A GPT for an hour on any GPU, or some hours on many CPU cores: any prepared data, any tokenizer.

    python prepare_pile.py --source=mine.jsonl --data_dir=data/mine
    python train.py configs/medium.py --data_dir=data/mine

Machine: a GPU with 8 GB of memory, or a CPU with 16 GB; 1.5 GB of disk. This project has not run it
in full, and on no GPU. The run says how long it will take after its third step.
Expected: 32,000 chunks with a value. The model has 11 million weights beside its vocabulary.
"""

batch_size = 8
gradient_accumulation_steps = 2
n_layer, n_head, n_embd = 6, 6, 384
max_iters = 2000
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100

rule = "adamw"
targets = "val"
target_batch = 4
book_interval = 20

eval_interval = 250
eval_chunks = 8
log_interval = 10
checkpoint_interval = 250
