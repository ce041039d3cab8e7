"""Published weights: a folder in Hugging Face's format, config.json and safetensors, as model.GPT
has its weights, and back.

Two families: GPT-2 (GPT2LMHeadModel) and Pythia (GPTNeoXForCausalLM). Nothing in the folder is
executed. What would be computed in another way than model.GPT does is refused.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from system.errors import UserError
from system.files import read_json

HUB = {  # what --init_from calls them, and where they are published
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-160m": "EleutherAI/pythia-160m",
    "pythia-410m": "EleutherAI/pythia-410m",
    "pythia-1b": "EleutherAI/pythia-1b",
    "pythia-1.4b": "EleutherAI/pythia-1.4b",
}
PREFIX = "hf:"  # of a folder
PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
# buffers, not weights: masks and frequencies
IGNORED = re.compile(r"(.*\.)?((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass
class Pretrained:
    folder: Path
    model_args: dict  # GPTConfig's, without dropout; block_size is the largest
    family: str  # gpt2 or neox
    settings: dict  # config.json

    def files(self):
        """The files of the weights. Raises UserError where there are none."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            content = read_json(index, "fetch it again", {"weight_map": dict}, unsealed=True)
            names = set(content["weight_map"].values())
            for name in names:
                if Path(str(name)).name != name:
                    raise UserError(f"{index} names a file elsewhere: fetch it again")
            return sorted(self.folder / name for name in names)
        path = self.folder / "model.safetensors"
        if not path.is_file():
            what = f"no weights in {self.folder}: it needs model.safetensors"
            raise UserError(f"{what} (convert others with transformers' save_pretrained)")
        return [path]

    def sha256(self):
        """Of the files of the weights, in the order of their names."""
        digest = hashlib.sha256()
        for path in self.files():
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def locate(name):
    """What --init_from says -> the folder. A published name is fetched from the hub, if it was not
    before. Raises UserError where neither is there."""
    if name.startswith(PREFIX):
        return Path(name.removeprefix(PREFIX))
    from huggingface_hub import errors, snapshot_download

    repository = HUB[name]
    try:
        return Path(snapshot_download(repository, allow_patterns=PATTERNS))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as e:
        what = f"{name} cannot be fetched from huggingface.co/{repository}"
        cure = f"download its files elsewhere, and write --init_from={PREFIX}<its folder>"
        raise UserError(f"{what} ({type(e).__name__}): {cure}") from e


def read(folder):
    """A folder -> Pretrained. Raises UserError for what model.GPT does not compute."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no {folder}/config.json: name a folder that save_pretrained wrote")
    cure = "take a GPT-2 or a Pythia"
    settings = read_json(folder / "config.json", cure, unsealed=True)
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{folder} holds a model of type {str(kind)[:40]!r}: {cure}")
    check_kinds(settings, folder)
    args = FAMILIES[kind].model_args(settings, folder)
    return Pretrained(folder, args, kind, settings)


WHOLE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "num_hidden_layers")
WHOLE += ("num_attention_heads", "hidden_size", "max_position_embeddings", "intermediate_size")


def check_kinds(settings, folder):
    """Raises UserError where a size is none."""
    for key in WHOLE:
        size = settings.get(key, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**31:
            raise UserError(f"{folder}/config.json: {key} is no size: fetch it again")


def need(settings, folder, **wanted):
    """Raises UserError where an option has a value that changes what is computed. wanted: {option:
    the value that model.GPT knows}, which is also the default."""
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            what = f"{folder}/config.json: {key} is {str(settings[key])[:40]!r}, not {value!r}"
            raise UserError(f"{what}: this model computes something else")


def gelu(name, folder):
    if name not in GELUS:
        known = ", ".join(GELUS)
        raise UserError(f"{folder}/config.json: activation {str(name)[:40]!r} is none of {known}")
    return GELUS[name]


class GPT2:
    @staticmethod
    def model_args(settings, folder):
        n_embd = settings.get("n_embd", 768)
        need(
            settings,
            folder,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
            layer_norm_epsilon=1e-5,
        )
        if settings.get("n_inner") not in (None, 4 * n_embd):
            raise UserError(f"{folder}/config.json: n_inner is not 4 n_embd, as model.py has it")
        return {
            "n_layer": settings.get("n_layer", 12),
            "n_head": settings.get("n_head", 12),
            "n_embd": n_embd,
            "block_size": settings.get("n_positions", 1024),
            "vocab_size": settings.get("vocab_size", 50257),
            "bias": True,
            "tie_weights": settings.get("tie_word_embeddings", True),
            "gelu": gelu(settings.get("activation_function", "gelu_new"), folder),
            "rotary_pct": 0.0,
            "parallel_residual": False,
        }

    @staticmethod
    def names(n_layer, tie_weights):
        """[(our name, their name, how theirs becomes ours)]"""
        pairs = [
            ("transformer.wte.weight", "transformer.wte.weight", same),
            ("transformer.wpe.weight", "transformer.wpe.weight", same),
            *both("transformer.ln_f", "transformer.ln_f", same),
        ]
        for i in range(n_layer):
            block = f"transformer.h.{i}"
            for part in ("ln_1", "ln_2"):
                pairs += both(f"{block}.{part}", f"{block}.{part}", same)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                # their Conv1D has its weight (in, out)
                pairs += both(f"{block}.{part}", f"{block}.{part}", transposed)
        if not tie_weights:
            pairs.append(("lm_head.weight", "lm_head.weight", same))
        return pairs

    @staticmethod
    def their_name(name):
        """A name as older files have it -> as new ones have it."""
        if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
            return f"transformer.{name}"
        return name

    tied_head = "lm_head.weight"

    @staticmethod
    def settings(args):
        """GPTConfig's -> config.json."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": args["n_layer"],
            "n_head": args["n_head"],
            "n_embd": args["n_embd"],
            "n_positions": args["block_size"],
            "vocab_size": args["vocab_size"],
            "activation_function": "gelu_new" if args["gelu"] == "tanh" else "gelu",
            "tie_word_embeddings": args["tie_weights"],
            "layer_norm_epsilon": 1e-5,
        }


class NeoX:
    @staticmethod
    def model_args(settings, folder):
        n_embd = settings.get("hidden_size", 6144)
        rope = settings.get("rope_parameters") or {}
        need(settings, folder, rope_scaling=None, attention_bias=True, layer_norm_eps=1e-5)
        need(settings, folder, rotary_emb_base=10000, rope_theta=10000)
        need(rope, folder, rope_theta=10000, rope_type="default")
        if settings.get("intermediate_size", 24576) != 4 * n_embd:
            what = f"{folder}/config.json: intermediate_size is not 4 hidden_size"
            raise UserError(f"{what}, as model.py has it")
        rotary_pct = rope.get("partial_rotary_factor", settings.get("rotary_pct", 0.25))
        if not isinstance(rotary_pct, (int, float)) or not 0 < rotary_pct <= 1:
            raise UserError(f"{folder}/config.json: rotary_pct is no part of 1: fetch it again")
        return {
            "n_layer": settings.get("num_hidden_layers", 44),
            "n_head": settings.get("num_attention_heads", 64),
            "n_embd": n_embd,
            "block_size": settings.get("max_position_embeddings", 2048),
            "vocab_size": settings.get("vocab_size", 50432),
            "bias": True,
            "tie_weights": settings.get("tie_word_embeddings", False),
            "gelu": gelu(settings.get("hidden_act", "gelu"), folder),
            "rotary_pct": float(rotary_pct),
            "parallel_residual": settings.get("use_parallel_residual", True),
        }

    @staticmethod
    def names(n_layer, tie_weights):
        """[(our name, their name, how theirs becomes ours)]"""
        pairs = [
            ("transformer.wte.weight", "gpt_neox.embed_in.weight", same),
            *both("transformer.ln_f", "gpt_neox.final_layer_norm", same),
        ]
        for i in range(n_layer):
            ours, theirs = f"transformer.h.{i}", f"gpt_neox.layers.{i}"
            pairs += both(f"{ours}.ln_1", f"{theirs}.input_layernorm", same)
            pairs += both(f"{ours}.ln_2", f"{theirs}.post_attention_layernorm", same)
            pairs += both(f"{ours}.attn.c_attn", f"{theirs}.attention.query_key_value", by_head)
            pairs += both(f"{ours}.attn.c_proj", f"{theirs}.attention.dense", same)
            pairs += both(f"{ours}.mlp.c_fc", f"{theirs}.mlp.dense_h_to_4h", same)
            pairs += both(f"{ours}.mlp.c_proj", f"{theirs}.mlp.dense_4h_to_h", same)
        if not tie_weights:
            pairs.append(("lm_head.weight", "embed_out.weight", same))
        return pairs

    @staticmethod
    def their_name(name):
        return name

    tied_head = "embed_out.weight"

    @staticmethod
    def settings(args):
        """GPTConfig's -> config.json."""
        return {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "num_hidden_layers": args["n_layer"],
            "num_attention_heads": args["n_head"],
            "hidden_size": args["n_embd"],
            "intermediate_size": 4 * args["n_embd"],
            "max_position_embeddings": args["block_size"],
            "vocab_size": args["vocab_size"],
            "hidden_act": "gelu_new" if args["gelu"] == "tanh" else "gelu",
            "rotary_pct": args["rotary_pct"],
            "rotary_emb_base": 10000,
            "use_parallel_residual": args["parallel_residual"],
            "attention_bias": True,
            "tie_word_embeddings": args["tie_weights"],
            "layer_norm_eps": 1e-5,
        }


FAMILIES = {"gpt2": GPT2, "gpt_neox": NeoX}


# --- from one layout to the other: of a tensor, and of how many heads there are --------


def both(ours, theirs, change):
    return [(f"{ours}.{part}", f"{theirs}.{part}", change) for part in ("weight", "bias")]


def same(x, n_head, back=False):
    return x


def transposed(x, n_head, back=False):
    return x.t() if x.dim() == 2 else x


def by_head(x, n_head, back=False):
    """Their rows lie head by head, in each its q, k and v; ours are all q, all k, all v. back: from
    ours to theirs."""
    shape = (3, n_head) if back else (n_head, 3)
    return x.unflatten(0, (*shape, -1)).transpose(0, 1).flatten(0, 2)


# --- weights ----------------------------------------------------------------------


def read_weights(pretrained):
    """model.GPT's state_dict, float32. Raises UserError where weights are missing, left over, or of
    other shapes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    args, folder = pretrained.model_args, pretrained.folder
    family = FAMILIES[pretrained.family]
    theirs = {}
    for path in pretrained.files():
        try:
            loaded = load_file(path)
        except SafetensorError as e:
            raise UserError(f"{path} is damaged ({type(e).__name__}): fetch it again") from e
        for name, x in loaded.items():
            if not IGNORED.fullmatch(name):
                theirs[family.their_name(name)] = x.float()
    weights = {}
    for ours, name, change in family.names(args["n_layer"], args["tie_weights"]):
        if name not in theirs:
            raise UserError(f"{folder}: no weight {name}: fetch it again")
        weights[ours] = change(theirs.pop(name), args["n_head"]).contiguous()
    if args["tie_weights"]:
        theirs.pop(family.tied_head, None)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if theirs:
        more = ", ".join(sorted(theirs)[:3])
        raise UserError(f"{folder}: weights that such a model does not have: {more[:200]}")
    return weights


def put_weights(model, pretrained):
    """The weights into a model.GPT; its block_size may be smaller. Raises UserError where they do
    not fit."""
    weights = read_weights(pretrained)
    own = model.state_dict()
    positions = "transformer.wpe.weight"
    if positions in own:
        weights[positions] = weights[positions][: len(own[positions])]
    for name, x in own.items():
        if weights[name].shape != x.shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(x.shape)}"
            raise UserError(f"{pretrained.folder}: {name} is {shapes}: fetch it again")
    model.load_state_dict(weights)


def write(folder, model_args, weights, about):
    """A folder that transformers loads. weights: model.GPT's state_dict. about: a dict for
    nanoshapley.json beside it. Raises UserError for a model that neither family has."""
    from safetensors.torch import save_file

    args = {"gelu": "none", "rotary_pct": 0.0, "parallel_residual": False, **model_args}
    if args["parallel_residual"] and not args["rotary_pct"]:
        what = "a parallel residual without rotary positions"
        raise UserError(f"{what}: no model of transformers that is known here has both")
    family = NeoX if args["rotary_pct"] else GPT2
    theirs = {}
    for ours, name, change in family.names(args["n_layer"], args["tie_weights"]):
        if ours in weights:
            x = change(weights[ours].float(), args["n_head"], back=True)
        else:  # a model without biases
            x = torch.zeros(len(weights[ours.removesuffix("bias") + "weight"]))
        theirs[name] = x.contiguous().clone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", family.settings(args)), ("nanoshapley.json", about)):
        text = json.dumps(content, indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
