"""
GPT-2 124M with its published weights, fine-tuned on text of one's own, every chunk valued.

    python prepare_pile.py --source=mine.jsonl --data_dir=data/mine
    python train.py configs/finetune_gpt2.py --init_from=gpt2 --data_dir=data/mine

nanoGPT's settings for fine-tuning (its finetune_shakespeare.py). Without a network:
--init_from=hf:<the folder with the weights>.

Machine: made for one GPU. This project has not run it. Expected: a loss that is below GPT-2's
within a hundred steps, and out/finetune_gpt2/values.npy.
"""

block_size = 1024
batch_size = 4
gradient_accumulation_steps = 8
dropout = 0.1

optimizer = "adamw"
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
max_iters = 200
weight_decay = 0.1
grad_clip = 1.0

rule = "adamw2"  # clipping bites in fine-tuning, and a step is few
targets = "val"
target_batch = 4

eval_interval = 20
log_interval = 1
checkpoint_interval = 50
hindsight = True
