"""Published weights: a folder in Hugging Face's format, config.json and safetensors, as model.GPT
has its weights, and back.

Two families: GPT-2 (GPT2LMHeadModel) and Pythia (GPTNeoXForCausalLM). Nothing in the folder is
executed. What would be computed in another way than model.GPT does is refused.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
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
REFETCH = "fetch it again"
FLOATS = ("F32", "F16", "BF16", "F64")  # as safetensors calls them
PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}
PIECE = re.compile(r"[\w.-]{1,200}\.safetensors")  # a file of an index
# buffers, not weights: masks and frequencies
IGNORED = re.compile(r"(.*\.)?((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq)")


@dataclass
class Pretrained:
    folder: Path
    model_args: dict  # GPTConfig's, without dropout; block_size is the largest
    family: type  # GPT2 or NeoX
    files: list  # paths of the weights, in the order of their names

    def sizes(self):
        """What model_args say of the weights, a dict: all but how many positions are used."""
        return {key: value for key, value in self.model_args.items() if key != "block_size"}

    def weights(self):
        """Which weights such a model has: [Weight]."""
        return self.family.weights(self.model_args)

    def sha256(self):
        """Of the files of the weights, in the order of their names."""
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


@dataclass
class Weight:
    ours: str  # its name in model.GPT
    theirs: str  # its name in their files
    shape: tuple  # that it has there
    change: Callable  # what makes ours of theirs, and with back=True theirs of ours


def locate(name):
    """What --init_from says -> the folder. A published name is fetched from the hub, if it was not
    before. Raises UserError where neither is there."""
    if name not in HUB:
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
    """A folder -> Pretrained. Raises UserError for what model.GPT does not compute, and where its
    weights are not those of its config.json. No weight is read yet, nor is memory taken for one."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"no {folder}/config.json: name a folder that save_pretrained wrote")
    cure = "take a GPT-2 or a Pythia"
    settings = read_json(folder / "config.json", cure, {"model_type": str}, unsealed=True)
    family = FAMILIES.get(settings["model_type"])
    if family is None:
        kind = settings["model_type"][:40]
        raise UserError(f"{folder} holds a model of type {kind!r}: {cure}")
    need(settings, folder, quantization_config=None)
    args = family.model_args(settings, folder)
    if args["n_embd"] % args["n_head"]:
        raise UserError(f"{folder}/config.json: its width is no multiple of its heads: {REFETCH}")
    found = Pretrained(folder, args, family, find_files(folder))
    check_headers(found)
    return found


def size(settings, folder, key, default):
    """An option that is a whole number from 1 on. Raises UserError."""
    value = settings.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise UserError(f"{folder}/config.json: {key} is no size: {REFETCH}")
    return value


def flag(settings, folder, key, default):
    """An option that is true or false. Raises UserError."""
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise UserError(f"{folder}/config.json: {key} is neither true nor false: {REFETCH}")
    return value


def need(settings, folder, **wanted):
    """Raises UserError where an option has a value that changes what is computed. wanted: {option:
    the value that model.GPT knows}, which is also the default."""
    for key, value in wanted.items():
        if settings.get(key, value) != value:
            what = f"{folder}/config.json: {key} is {str(settings[key])[:40]!r}, not {value!r}"
            raise UserError(f"{what}: this model computes something else")


def gelu(name, folder):
    if not isinstance(name, str) or name not in GELUS:
        known = ", ".join(GELUS)
        raise UserError(f"{folder}/config.json: activation {str(name)[:40]!r} is none of {known}")
    return GELUS[name]


class GPT2:
    @staticmethod
    def model_args(settings, folder):
        n_embd = size(settings, folder, "n_embd", 768)
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
            "n_layer": size(settings, folder, "n_layer", 12),
            "n_head": size(settings, folder, "n_head", 12),
            "n_embd": n_embd,
            "block_size": size(settings, folder, "n_positions", 1024),
            "vocab_size": size(settings, folder, "vocab_size", 50257),
            "bias": True,
            "tie_weights": flag(settings, folder, "tie_word_embeddings", True),
            "gelu": gelu(settings.get("activation_function", "gelu_new"), folder),
            "rotary_pct": 0.0,
            "parallel_residual": False,
        }

    @staticmethod
    def weights(args):
        C, V, T = args["n_embd"], args["vocab_size"], args["block_size"]
        weights = [
            Weight("transformer.wte.weight", "transformer.wte.weight", (V, C), same),
            Weight("transformer.wpe.weight", "transformer.wpe.weight", (T, C), same),
            *layer("transformer.ln_f", "transformer.ln_f", (C,), C),
        ]
        for i in range(args["n_layer"]):
            block = f"transformer.h.{i}"
            weights += layer(f"{block}.ln_1", f"{block}.ln_1", (C,), C)
            weights += layer(f"{block}.ln_2", f"{block}.ln_2", (C,), C)
            # their Conv1D has its weight (in, out)
            for part, n_in, n_out in (
                ("attn.c_attn", C, 3 * C),
                ("attn.c_proj", C, C),
                ("mlp.c_fc", C, 4 * C),
                ("mlp.c_proj", 4 * C, C),
            ):
                name = f"{block}.{part}"
                weights += layer(name, name, (n_in, n_out), n_out, transposed)
        if not args["tie_weights"]:
            weights.append(Weight("lm_head.weight", "lm_head.weight", (V, C), same))
        return weights

    @staticmethod
    def their_name(name):
        """A name as older files have it -> as new ones have it."""
        if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):
            return f"transformer.{name}"
        return name

    head = "lm_head.weight"

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
            # else transformers trains with a tenth
            **dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), args["dropout"]),
        }


class NeoX:
    @staticmethod
    def model_args(settings, folder):
        n_embd = size(settings, folder, "hidden_size", 6144)
        n_head = size(settings, folder, "num_attention_heads", 64)
        rope = settings.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise UserError(f"{folder}/config.json: rope_parameters is no list of keys: {REFETCH}")
        need(settings, folder, rope_scaling=None, attention_bias=True, layer_norm_eps=1e-5)
        need(settings, folder, rotary_emb_base=10000, rope_theta=10000)
        need(rope, folder, rope_theta=10000, rope_type="default")
        if size(settings, folder, "intermediate_size", 24576) != 4 * n_embd:
            what = f"{folder}/config.json: intermediate_size is not 4 hidden_size"
            raise UserError(f"{what}, as model.py has it")
        return {
            "n_layer": size(settings, folder, "num_hidden_layers", 44),
            "n_head": n_head,
            "n_embd": n_embd,
            "block_size": size(settings, folder, "max_position_embeddings", 2048),
            "vocab_size": size(settings, folder, "vocab_size", 50432),
            "bias": True,
            "tie_weights": flag(settings, folder, "tie_word_embeddings", False),
            "gelu": gelu(settings.get("hidden_act", "gelu"), folder),
            "rotary_pct": rotary_part(settings, rope, n_embd // n_head, folder),
            "parallel_residual": flag(settings, folder, "use_parallel_residual", True),
        }

    @staticmethod
    def weights(args):
        C, V = args["n_embd"], args["vocab_size"]
        weights = [
            Weight("transformer.wte.weight", "gpt_neox.embed_in.weight", (V, C), same),
            *layer("transformer.ln_f", "gpt_neox.final_layer_norm", (C,), C),
        ]
        for i in range(args["n_layer"]):
            ours, theirs = f"transformer.h.{i}", f"gpt_neox.layers.{i}"
            weights += layer(f"{ours}.ln_1", f"{theirs}.input_layernorm", (C,), C)
            weights += layer(f"{ours}.ln_2", f"{theirs}.post_attention_layernorm", (C,), C)
            for part, their_part, n_in, n_out, change in (
                ("attn.c_attn", "attention.query_key_value", C, 3 * C, by_head),
                ("attn.c_proj", "attention.dense", C, C, same),
                ("mlp.c_fc", "mlp.dense_h_to_4h", C, 4 * C, same),
                ("mlp.c_proj", "mlp.dense_4h_to_h", 4 * C, C, same),
            ):
                names = f"{ours}.{part}", f"{theirs}.{their_part}"
                weights += layer(*names, (n_out, n_in), n_out, change)
        if not args["tie_weights"]:
            weights.append(Weight("lm_head.weight", "embed_out.weight", (V, C), same))
        return weights

    @staticmethod
    def their_name(name):
        return name

    head = "embed_out.weight"

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
            **dict.fromkeys(("hidden_dropout", "attention_dropout"), args["dropout"]),
        }


FAMILIES = {"gpt2": GPT2, "gpt_neox": NeoX}


def rotary_part(settings, rope, head_size, folder):
    """Which part of each head is turned by its position. Raises UserError where that is no even
    number of numbers from 2 on."""
    part = rope.get("partial_rotary_factor", settings.get("rotary_pct", 0.25))
    is_number = isinstance(part, (int, float)) and not isinstance(part, bool)
    if not is_number or not 0 < part <= 1 or not is_pairs(head_size, part):
        what = f"{folder}/config.json: rotary_pct={str(part)[:40]} turns no pairs of the"
        raise UserError(f"{what} {head_size} numbers of a head: {REFETCH}")
    return float(part)


def is_pairs(head_size, rotary_pct):
    """Whether rotary positions turn whole pairs of a head's numbers, one at least."""
    n_rotary = int(head_size * rotary_pct)
    return 2 <= n_rotary <= head_size and n_rotary % 2 == 0


# --- from one layout to the other: of a tensor, and of how many heads there are --------


def layer(ours, theirs, shape, n_out, change=None):
    """A layer's weight, of that shape in their files, and its bias."""
    change = change or same
    return [
        Weight(f"{ours}.weight", f"{theirs}.weight", shape, change),
        Weight(f"{ours}.bias", f"{theirs}.bias", (n_out,), change),
    ]


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


def find_files(folder):
    """The files of the weights, in the order of their names; as in transformers the whole file
    before the pieces of an index. Raises UserError where there are none."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        content = read_json(index, REFETCH, {"weight_map": dict}, unsealed=True)
        names = list(content["weight_map"].values())
        for name in names:
            if not isinstance(name, str) or not PIECE.fullmatch(name):
                raise UserError(f"{index} names something else than files beside it: {REFETCH}")
    paths = [folder / name for name in sorted(set(names))]
    for path in paths:
        if not path.is_file():
            what = f"no {path}: the weights must be in safetensors"
            raise UserError(f"{what} (transformers' save_pretrained writes them)")
    return paths


@contextlib.contextmanager
def opened(path):
    """A file of weights, by safetensors. Raises UserError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}): {REFETCH}") from e


def names_in(file, family):
    """The weights of an open file: [(its name there, the name that new files have)]."""
    names = [name for name in sorted(file.keys()) if not IGNORED.fullmatch(name)]
    return [(name, family.their_name(name)) for name in names]


def check_headers(found):
    """Raises UserError where the files have other weights than config.json speaks of: missing,
    left over, twice, of other shapes or of whole numbers."""
    shapes = {}
    for path in found.files:
        with opened(path) as file:
            for name, new_name in names_in(file, found.family):
                header = file.get_slice(name)
                if header.get_dtype() not in FLOATS:
                    what = f"{path}: {name[:80]} is of {header.get_dtype()[:20]}"
                    raise UserError(f"{what}: take weights in {', '.join(FLOATS)}")
                if new_name in shapes:
                    raise UserError(f"{found.folder}: {name[:80]} stands twice: {REFETCH}")
                shapes[new_name] = tuple(header.get_shape())
    args, folder = found.model_args, found.folder
    if args["n_layer"] > len(shapes):  # before a billion of them are listed
        what = f"{folder}: config.json speaks of {args['n_layer']} layers"
        raise UserError(f"{what}, and there are {len(shapes)} weights: {REFETCH}")
    if args["tie_weights"]:
        shapes.pop(found.family.head, None)  # read_weights() looks at it
    for weight in found.weights():
        shape = shapes.pop(weight.theirs, None)
        if shape is None:
            raise UserError(f"{folder}: no weight {weight.theirs}: {REFETCH}")
        if shape != weight.shape:
            what = f"{folder}: {weight.theirs} is {shape}, not {weight.shape}"
            raise UserError(f"{what}: {REFETCH}")
    if shapes:
        more = ", ".join(sorted(shapes)[:3])
        raise UserError(f"{folder}: weights that such a model does not have: {more[:200]}")


def read_weights(found):
    """model.GPT's state_dict, float32. Raises UserError where a weight is not finite, or where a
    head is not the embedding's matrix though config.json says so."""
    theirs = {}
    for path in found.files:
        with opened(path) as file:
            for name, new_name in names_in(file, found.family):
                theirs[new_name] = file.get_tensor(name).float()
    for name, x in theirs.items():
        if not bool(torch.isfinite(x).all()):
            raise UserError(f"{found.folder}: {name} is not finite: {REFETCH}")
    weights = {}
    for weight in found.weights():
        x = theirs[weight.theirs]
        weights[weight.ours] = weight.change(x, found.model_args["n_head"]).contiguous()
    if found.model_args["tie_weights"]:
        wte = weights["transformer.wte.weight"]
        head = theirs.get(found.family.head, wte)
        if not torch.equal(head, wte):
            what = f"{found.folder}: {found.family.head} is not the embedding's matrix"
            raise UserError(f'{what}: write "tie_word_embeddings": false into its config.json')
        weights["lm_head.weight"] = wte
    return weights


def put_weights(model, found):
    """The weights into a model.GPT of found.model_args; its block_size may be smaller."""
    weights = read_weights(found)
    positions = "transformer.wpe.weight"
    if positions in weights:
        weights[positions] = weights[positions][: model.config.block_size]
    model.load_state_dict(weights)


def write(folder, model_args, weights, eot):
    """A folder that transformers loads. weights: model.GPT's state_dict. eot: the token between
    documents. Raises UserError for a model that neither family has."""
    from safetensors.torch import save_file

    older = {"gelu": "none", "rotary_pct": 0.0, "parallel_residual": False, "dropout": 0.0}
    args = {**older, **model_args}
    if args["parallel_residual"] and not args["rotary_pct"]:
        what = "a parallel residual without rotary positions"
        raise UserError(f"{what}: no model of transformers that is known here has both")
    family = NeoX if args["rotary_pct"] else GPT2
    theirs = {}
    for weight in family.weights(args):
        if weight.ours in weights:
            x = weight.change(weights[weight.ours].float(), args["n_head"], back=True)
        else:  # a model without biases
            x = torch.zeros(weight.shape)
        theirs[weight.theirs] = x.contiguous().clone()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    write_settings(folder / "config.json", {**family.settings(args), **ends})


def write_settings(path, content):
    """A file of JSON as others read it: without a seal."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
