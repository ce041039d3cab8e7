"""
Full definition of a GPT Language Model, all of it in this single file: nanoGPT's model, whose
Linear, Embedding and LayerNorm also take a ledger, whose gradient is each chunk's value
(shapley/ghost.py). Without a ledger it computes what nanoGPT's computes, to the bit. By GPTConfig
it is a Pythia too: rotary positions, and attention and MLP side by side.
References:
1) the official GPT-2 TensorFlow implementation released by OpenAI:
https://github.com/openai/gpt-2/blob/master/src/model.py
2) nanoGPT by Andrej Karpathy, MIT licence:
https://github.com/karpathy/nanoGPT/blob/master/model.py
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from shapley import ghost, head

# -----------------------------------------------------------------------------
# layers that take the ledger; without one they are PyTorch's own


class Linear(nn.Linear):
    def forward(self, x, ledger=None):
        if ledger is None:
            return super().forward(x)
        return ghost.linear(x, self.weight, self.bias, ledger)


class Embedding(nn.Embedding):
    def forward(self, idx, ledger=None):
        if ledger is None:
            return super().forward(idx)
        return ghost.embedding(idx, self.weight, ledger)


class LayerNorm(nn.LayerNorm):
    def forward(self, x, ledger=None):
        if ledger is None:
            return super().forward(x)
        return ghost.layer_norm(x, self.weight, self.bias, self.eps, ledger)


# -----------------------------------------------------------------------------


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        # key, query, value projections for all heads, but in a batch
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        # output projection
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        # regularization
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.dropout = config.dropout
        # of each head so many numbers are turned by their position
        self.n_rotary = int(config.n_embd // config.n_head * config.rotary_pct)

    def forward(self, x, ledger=None):
        B, T, C = x.size()  # batch size, sequence length, embedding dimensionality (n_embd)

        # calculate query, key, values for all heads in batch
        q, k, v = self.c_attn(x, ledger).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if self.n_rotary:
            q, k = rotate(q, self.n_rotary), rotate(k, self.n_rotary)

        # causal self-attention; Self-attend: (B, nh, T, hs) x (B, nh, hs, T) -> (B, nh, T, T)
        dropout_p = self.dropout if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        # re-assemble all head outputs side by side
        y = y.transpose(1, 2).contiguous().view(B, T, C)

        # output projection
        y = self.resid_dropout(self.c_proj(y, ledger))
        return y


def rotate(x, n_rotary):
    """Rotary position embedding of the first n_rotary numbers of each head, as GPT-NeoX has it.

    x (B, nh, T, hs). The pairs (i, i + n_rotary / 2) turn by position * 10000^(-2 i / n_rotary).
    Source: Su et al., arXiv 2104.09864, section 3.4."""
    turned, rest = x[..., :n_rotary], x[..., n_rotary:]
    halves = torch.arange(0, n_rotary, 2, device=x.device, dtype=torch.float32)
    frequency = 1.0 / 10000 ** (halves / n_rotary)
    position = torch.arange(x.shape[2], device=x.device, dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (T, n_rotary / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = turned.chunk(2, -1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return torch.cat((turned, rest), -1)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, ledger=None):
        x = self.c_fc(x, ledger)
        x = self.gelu(x)
        x = self.c_proj(x, ledger)
        x = self.dropout(x)
        return x


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.parallel_residual = config.parallel_residual

    def forward(self, x, ledger=None):
        if self.parallel_residual:
            attended = self.attn(self.ln_1(x, ledger), ledger)
            return x + attended + self.mlp(self.ln_2(x, ledger), ledger)
        x = x + self.attn(self.ln_1(x, ledger), ledger)
        x = x + self.mlp(self.ln_2(x, ledger), ledger)
        return x


@dataclass
class GPTConfig:
    block_size: int = 1024
    # GPT-2 vocab_size of 50257, padded up to nearest multiple of 64 for efficiency
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    # True: bias in Linears and LayerNorms, like GPT-2. False: a bit better and faster
    bias: bool = True
    tie_weights: bool = True  # wte and lm_head share one matrix, like GPT-2
    gelu: str = "none"  # or "tanh": the approximation that GPT-2's weights were trained with
    # the part of each head that is turned by its position, instead of wpe; 0: none
    rotary_pct: float = 0.0
    parallel_residual: bool = False  # attention and MLP read the same x


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.vocab_size is not None
        assert config.block_size is not None
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
        if config.rotary_pct:
            del self.transformer["wpe"]  # the attention knows the positions
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            # https://paperswithcode.com/method/weight-tying
            self.transformer.wte.weight = self.lm_head.weight
        for weight in {self.transformer.wte.weight, self.lm_head.weight}:
            # its rows are tokens: a valuation knows before a step which of them will move
            weight.tokens = True

        # init all weights
        self.apply(self._init_weights)
        # apply special scaled init to the residual projections, per GPT-2 paper
        for pn, p in self.named_parameters():
            if pn.endswith("c_proj.weight"):
                torch.nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))
        # set by a forward with a ledger: see shapley/ghost.py
        self.chunk_loss = self.chunk_weight = None

    @classmethod
    def from_checkpoint(cls, checkpoint):
        """A checkpoint's model, with its weights. Raises ValueError, or what torch raises, where
        its model_args are those of another one."""
        args, weights = checkpoint["model_args"], checkpoint["model"]
        layers = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
        if args["n_layer"] != len(layers):  # before a billion of them are built
            n_layer = args["n_layer"]
            raise ValueError(f"model_args speak of {n_layer} layers, there are {len(layers)}")
        with torch.device("meta"):  # it takes no memory
            model = cls(GPTConfig(**args))
        model.load_state_dict(weights, assign=True)
        return model

    def get_num_params(self, non_embedding=True):
        """
        Return the number of parameters in the model.
        For non-embedding count (default), the position embeddings get subtracted.
        The token embeddings would too, except due to the parameter sharing these
        params are actually used as weights in the final layer, so we include them.
        """
        n_params = sum(p.numel() for p in self.parameters() if p.requires_grad)
        if non_embedding and "wpe" in self.transformer:
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            torch.nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def features(self, idx, ledger=None):
        """What the head sees of each token: (B, T, n_embd), of idx (B, T) int64."""
        device = idx.device
        b, t = idx.size()
        if t > self.config.block_size:
            what = f"a sequence of {t} tokens does not fit block_size={self.config.block_size}"
            raise ValueError(what)
        pos = torch.arange(0, t, dtype=torch.long, device=device)  # shape (t)
        if ledger is not None:
            pos = pos.expand(b, t)  # a chunk's use of wpe is its own

        tok_emb = self.transformer.wte(idx, ledger)  # token embeddings of shape (b, t, n_embd)
        if self.config.rotary_pct:
            x = self.transformer.drop(tok_emb)
        else:
            pos_emb = self.transformer.wpe(pos, ledger)  # position embeddings of shape (t, n_embd)
            x = self.transformer.drop(tok_emb + pos_emb)
        for block in self.transformer.h:
            x = block(x, ledger)
        return self.transformer.ln_f(x, ledger)

    def forward(self, idx, targets=None, ledger=None):
        """idx (B, T) int64; targets (B, T) int64, -1 where nothing is to be predicted; ledger
        (B, K) zeros that require grad, or None.

        Returns logits (B, T, vocab_size), and the mean loss of the tokens that are to be predicted,
        in nats; 0 where there is none. Without targets the logits are (B, 1, vocab_size). Where the
        head works chunk by chunk (shapley/head.py) they are None.
        """
        # forward the GPT model itself
        x = self.features(idx, ledger)

        if targets is None:
            # inference-time mini-optimization: only forward the lm_head on the very last position
            logits = self.lm_head(x[:, [-1], :])  # note: using list [-1] to preserve the time dim
            return logits, None
        n_labels = (targets >= 0).sum(1)
        if ledger is not None:
            self.chunk_weight = n_labels
        if head.is_chunked(x, self.lm_head.weight, ledger):
            # the logits, the largest tensor of the step, never exist whole
            loss, self.chunk_loss = head.loss(x, self.lm_head.weight, targets, ledger)
            return None, loss
        logits = self.lm_head(x, ledger)
        flat_logits = logits.view(-1, logits.size(-1))
        flat_targets = targets.reshape(-1)
        if ledger is None:
            # if we are given some desired targets also calculate the loss
            loss = F.cross_entropy(flat_logits, flat_targets, ignore_index=-1, reduction="sum")
            return logits, loss / n_labels.sum().clamp(min=1)
        token_loss = F.cross_entropy(flat_logits, flat_targets, ignore_index=-1, reduction="none")
        token_loss = token_loss.view(idx.shape)
        self.chunk_loss = token_loss.detach().sum(1) / n_labels.clamp(min=1)
        return logits, token_loss.sum() / n_labels.sum().clamp(min=1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        # start with all of the candidate parameters
        param_dict = {pn: p for pn, p in self.named_parameters()}
        # filter out those that do not require grad
        param_dict = {pn: p for pn, p in param_dict.items() if p.requires_grad}
        # create optim groups. Any parameters that is 2D will be weight decayed, otherwise no.
        # i.e. all weight tensors in matmuls + embeddings decay, all biases and layernorms don't.
        decay_params = [p for n, p in param_dict.items() if p.dim() >= 2]
        nodecay_params = [p for n, p in param_dict.items() if p.dim() < 2]
        optim_groups = [
            {"params": decay_params, "weight_decay": weight_decay},
            {"params": nodecay_params, "weight_decay": 0.0},
        ]
        # Create AdamW optimizer and use the fused version if it is available
        fused = True if device_type == "cuda" else None
        return torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, fused=fused)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """estimate model flops utilization (MFU) in units of peak_flops, A100 bfloat16 by
        default"""
        # first estimate the number of flops we do per iteration.
        # see PaLM paper Appendix B as ref: https://arxiv.org/abs/2204.02311
        N = self.get_num_params()
        cfg = self.config
        L, H, Q, T = cfg.n_layer, cfg.n_head, cfg.n_embd // cfg.n_head, cfg.block_size
        flops_per_token = 6 * N + 12 * L * H * Q * T
        flops_per_fwdbwd = flops_per_token * T
        flops_per_iter = flops_per_fwdbwd * fwdbwd_per_iter
        # express our flops throughput as ratio of peak flops
        flops_achieved = flops_per_iter * (1.0 / dt)  # per second
        return flops_achieved / peak_flops

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """
        Take a conditioning sequence of indices idx (LongTensor of shape (b,t)) and complete
        the sequence max_new_tokens times, feeding the predictions back into the model each time.
        Most likely you'll want to make sure to be in model.eval() mode of operation for this.
        """
        for _ in range(max_new_tokens):
            # if the sequence context is growing too long we must crop it at block_size
            if idx.size(1) <= self.config.block_size:
                idx_cond = idx
            else:
                idx_cond = idx[:, -self.config.block_size :]
            # forward the model to get the logits for the index in the sequence
            logits, _ = self(idx_cond)
            # pluck the logits at the final step and scale by desired temperature
            logits = logits[:, -1, :] / temperature
            # optionally crop the logits to only the top k options
            if top_k is not None:
                v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
                logits[logits < v[:, [-1]]] = -float("Inf")
            # apply softmax to convert logits to (normalized) probabilities
            probs = F.softmax(logits, dim=-1)
            # sample from the distribution
            idx_next = torch.multinomial(probs, num_samples=1)
            # append sampled index to the running sequence and continue
            idx = torch.cat((idx, idx_next), dim=1)

        return idx
