"""
Full definition of a GPT language model, all of it in this single file: nanoGPT's model (Karpathy, MIT licence), whose
Linear, Embedding and LayerNorm also take a ledger (see ghost.py) and return each chunk's value as its gradient.

Reference: the official GPT-2 TensorFlow implementation released by OpenAI, github.com/openai/gpt-2/blob/master/src/model.py
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from shapley import ghost, head

# --- layers that take the ledger; without one they are PyTorch's own ----------


class Linear(nn.Linear):
    def forward(self, x, ledger=None):
        return (
            super().forward(x)
            if ledger is None
            else ghost.linear(x, self.weight, self.bias, ledger)
        )


class Embedding(nn.Embedding):
    def forward(self, idx, ledger=None):
        return super().forward(idx) if ledger is None else ghost.embedding(idx, self.weight, ledger)


class LayerNorm(nn.LayerNorm):
    def forward(self, x, ledger=None):
        return (
            super().forward(x)
            if ledger is None
            else ghost.layer_norm(x, self.weight, self.bias, self.eps, ledger)
        )


# --- the transformer ----------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(
            config.n_embd, 3 * config.n_embd, bias=config.bias
        )  # query, key, value of all heads
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout

    def forward(self, x, ledger=None):
        B, T, C = x.size()  # batch size, sequence length, embedding dimensionality (n_embd)
        q, k, v = self.c_attn(x, ledger).split(self.n_embd, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0, is_causal=True
        )
        y = (
            y.transpose(1, 2).contiguous().view(B, T, C)
        )  # re-assemble all head outputs side by side
        return self.resid_dropout(self.c_proj(y, ledger))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, ledger=None):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x, ledger)), ledger))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, ledger=None):
        x = x + self.attn(self.ln_1(x, ledger), ledger)
        return x + self.mlp(self.ln_2(x, ledger), ledger)


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = (
        50304  # GPT-2 vocab_size of 50257, padded up to nearest multiple of 64 for efficiency
    )
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = (
        True  # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    )
    tie_weights: bool = True  # wte and lm_head share one matrix, like GPT-2


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=Embedding(config.vocab_size, config.n_embd),
                wpe=Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = (
                self.lm_head.weight
            )  # https://paperswithcode.com/method/weight-tying
        for weight in {self.transformer.wte.weight, self.lm_head.weight}:
            weight.tokens = (
                True  # its rows are tokens: valuation knows before a step which of them will move
            )
        self.apply(self._init_weights)
        # special scaled init to the residual projections, per GPT-2 paper
        for pn, p in self.named_parameters():
            if pn.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        self.chunk_loss = None  # (B,) nats: set by a forward with a ledger

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """A checkpoint's model, with its weights. Raises ValueError, or what torch raises, where its
        model_args are those of another one."""
        args, weights = checkpoint["model_args"], checkpoint["model"]
        layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
        if args["n_layer"] != len(layers):  # before a billion of them are built
            raise ValueError(
                f"model_args speak of {args['n_layer']} layers, there are {len(layers)}"
            )
        with torch.device("meta"):  # which takes no memory
            model = cls(GPTConfig(**args))
        model.load_state_dict(weights, assign=True)
        return model

    def get_num_params(self, non_embedding=True):
        """Number of parameters; by default without the position embeddings (the token embeddings double as the head)."""
        n_params = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return n_params - self.transformer.wpe.weight.numel() if non_embedding else n_params

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, ledger=None):
        """idx (B, T) int64; targets (B, T) int64, -1 where nothing is to be predicted; ledger (B, K) zeros that require
        grad, or None. Returns logits (B, T, vocab_size), or (B, 1, vocab_size) without targets, or None where the head works
        chunk by chunk (shapley/head.py), and the mean token loss in nats.
        """
        B, T = idx.size()
        if T > self.config.block_size:
            raise ValueError(
                f"a sequence of {T} tokens does not fit block_size={self.config.block_size}"
            )
        pos = torch.arange(T, device=idx.device)  # (T,)
        if ledger is not None:
            pos = pos.expand(B, T)  # a chunk's use of wpe is its own
        tok_emb = self.transformer.wte(idx, ledger)  # (B, T, n_embd)
        pos_emb = self.transformer.wpe(pos, ledger)  # (T, n_embd) or (B, T, n_embd)
        x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, ledger)
        x = self.transformer.ln_f(x, ledger)

        if (
            targets is None
        ):  # inference-time mini-optimization: only forward the lm_head on the very last position
            return self.lm_head(x[:, [-1], :]), None
        if head.is_chunked(
            x, self.lm_head.weight, ledger
        ):  # the logits, the largest tensor of the step, never exist whole
            loss, self.chunk_loss = head.loss(x, self.lm_head.weight, targets, ledger)
            return None, loss
        logits = self.lm_head(x, ledger)
        flat = logits.view(-1, logits.size(-1)), targets.reshape(-1)
        if ledger is None:
            return logits, F.cross_entropy(*flat, ignore_index=-1)
        token_loss = F.cross_entropy(*flat, reduction="none").view(B, T)
        self.chunk_loss = token_loss.detach().mean(1)
        return logits, token_loss.mean()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW; all 2D parameters (matmuls and embeddings) are decayed, biases and layernorms are not."""
        params = [p for p in self.parameters() if p.requires_grad]
        optim_groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            optim_groups, lr=learning_rate, betas=betas, fused=device_type == "cuda" or None
        )

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model flops utilization (MFU) in units of peak_flops, A100 bfloat16 by default; PaLM paper, appendix B."""
        N, cfg = self.get_num_params(), self.config
        L, H, Q, T = cfg.n_layer, cfg.n_head, cfg.n_embd // cfg.n_head, cfg.block_size
        flops_per_token = 6 * N + 12 * L * H * Q * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Complete idx (B, T) int64 max_new_tokens times, feeding the predictions back in. Call model.eval() first."""
        for _ in range(max_new_tokens):
            idx_cond = idx[:, -self.config.block_size :]  # crop to block_size
            logits, _ = self(idx_cond)
            logits = logits[:, -1, :] / temperature
            if top_k is not None:
                v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < v[:, [-1]]] = -float("Inf")
            idx_next = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)
            idx = torch.cat((idx, idx_next), dim=1)
        return idx
