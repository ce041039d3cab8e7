"""What prepare_pile.py ends with: the table of a data folder, what to beware of, what to type next.

meta: the content of the folder's meta.json everywhere.
"""

import math
from dataclasses import dataclass

import numpy as np

from pile.domains import LONGEST
from pile.files import explain_left_out
from show import findings, tables
from system.terminal import listed, visible

NAMED = 5  # domains that a line names
MOST_DOMAINS = 40  # rows of the table of a prepared data folder


def table(meta):
    """The lines of a data folder's table, from its meta.json: its domains, and what became of the
    rest."""
    by_domain = meta["by_domain"]
    total = sum(meta["tokens"].values())
    tokens = {name: tokens_of(splits) for name, splits in by_domain.items()}
    largest = set(sorted(tokens, key=lambda name: -tokens[name])[:MOST_DOMAINS])
    told = [name for name in by_domain if name in largest]  # in their own order
    lengths = [len(visible(name)) for name in ["domain", *told]]
    width = min(28, max(lengths))
    head = f"{'documents':>10} {'train chunks':>13} {'val chunks':>11} {'tokens':>14} {'share':>6}"
    lines = [f"{'domain':<{width}} {head}"]
    for name in told:
        train = by_domain[name]["train"]
        val = by_domain[name]["val"]
        documents = f"{train['documents'] + val['documents']:>10,}"
        chunks = f"{train['chunks']:>13,} {val['chunks']:>11,}"
        share = f"{tokens[name]:>14,} {tokens[name] / total:>6.1%}"
        lines.append(f"{tables.fit(name, width)} {documents} {chunks} {share}")
    if len(told) < len(by_domain):
        rest = total - sum(tokens[name] for name in told)
        lines.append(f"and {len(by_domain) - len(told):,} smaller domains: {rest:,} tokens")
    dropped = f"{meta['dropped_tokens']:,} tokens, {meta['dropped_documents']:,} whole documents"
    lines.append(f"dropped at the ends of domains: {dropped}")
    return [*lines, *set_aside(meta)]


def tokens_of(splits):
    """{split: its counts} -> tokens of all of them."""
    return sum(counts["tokens"] for counts in splits.values())


def set_aside(meta):
    """Lines on what a data folder's source held that is not in it, or not as it was meant to be."""
    settings = meta["config"]
    lines = explain_left_out(meta["left_out"])
    fallback = "under their file's name"
    if meta["no_domain"]:
        documents = tables.counted(meta["no_domain"], "document")
        lines.append(f"{documents} without {settings['domain_key']}, {fallback}")
    if meta["long_domain"]:
        documents = tables.counted(meta["long_domain"], "document")
        lines.append(f"{documents} with a domain of over {LONGEST} characters, {fallback}")
    if meta["skipped"]["too_long"]:
        records = tables.counted(meta["skipped"]["too_long"], "record")
        limit = f"--max_document_mb={settings['max_document_mb']}"
        lines.append(f"{records} longer than {limit}: a larger one reads more, and needs memory")
    if meta["skipped"].get("too_many_tokens"):
        pairs = tables.counted(meta["skipped"]["too_many_tokens"], "pair")
        lines.append(f"{pairs} longer than --block_size={meta['block_size']}: dropped, not cut")
    reasons = [f"{n} {why}" for why, n in meta["skipped"].items() if n]
    skipped = ", ".join(reasons) or "nothing"
    return [*lines, f"{meta['documents']:,} documents; skipped: {skipped}"]


# --- domains that cannot be compared, or not be targets -------------------------------


def few_chunks(meta):
    """A line on the domains with fewer chunks than a comparison needs; empty where there is none.

    Their medians say little, see show/findings.py."""
    few = []
    for name, splits in meta["by_domain"].items():
        if splits["train"]["chunks"] < findings.FEW:
            few.append(name)
    if not few:
        return ""
    have = "domain has" if len(few) == 1 else "domains have"
    what = f"{len(few):,} {have} fewer than {findings.FEW} chunks to train on"
    cure = f"read more text, or lower --block_size={meta['block_size']}"
    return f"{what}, too few to be compared ({listed(few, NAMED)}): {cure}"


def not_validated(meta):
    """The domains with chunks to train on, and none in val.npy."""
    names = []
    for name, splits in meta["by_domain"].items():
        if splits["train"]["chunks"] and not splits["val"]["chunks"]:
            names.append(name)
    return names


def explain_not_validated(meta, names):
    """A line on what it means that these domains have no validation chunk."""
    n = f"{len(names):,} of {len(meta['by_domain']):,}"
    if len(names) == 1:
        what = f"{n} domains has no validation chunk: val leaves it out, and it cannot be a target"
    else:
        what = f"{n} domains have no validation chunk: val leaves them out, none can be a target"
    return f"{what} ({listed(names, NAMED)})"


MOST_VALIDATION = 0.3  # of the documents


def larger_fraction(meta, names):
    """A --val_fraction by which most of these domains have validation chunks; None where none
    would do.

    The median one of them is to have three times what is needed, for the split is by chance."""
    sizes = []
    for name in names:
        train = meta["by_domain"][name]["train"]
        sizes.append(min(train["chunks"], train["documents"]))
    before = meta["config"]["val_fraction"]
    wanted = max(2 * before, 3 / float(np.median(sizes)))
    wanted = min(MOST_VALIDATION, math.ceil(100 * wanted) / 100)
    return wanted if wanted > before else None


# --- what to type next ------------------------------------------------------------------


@dataclass
class Next:
    """A config file for train.py."""

    config: str
    reason: str  # why this one, in words


TOKENS = {"medium": 10**7, "gpt2_inrun": 10**9}  # that a config needs, to meet few chunks twice
GPT2_BLOCK = 1024  # tokens of a chunk of gpt2_inrun
MEDIUM_GB = 7.5  # of GPU memory: what is sold as 8 GB has a little less
GPT2_GB = 75  # the same, of 80 GB


def choose_config(meta, gpu_gb):
    """The Next that fits the data and the machine. gpu_gb: the memory of its largest GPU, 0 where
    there is none."""
    tokens = meta["tokens"]["train"]
    have = f"{tokens:,} tokens"
    small = "configs/small.py"
    quick = "a small model, a quarter of an hour at the most"
    if gpu_gb < MEDIUM_GB:
        gpu = f"a GPU of {gpu_gb:.0f} GB" if gpu_gb else "no GPU"
        return Next(small, f"{have} and {gpu}: {quick}")
    if tokens < TOKENS["medium"]:
        return Next(small, f"{have} are few: {quick}")
    is_large = tokens >= TOKENS["gpt2_inrun"] and meta["block_size"] >= GPT2_BLOCK
    if is_large and gpu_gb >= GPT2_GB:
        reason = f"{have} and a GPU of {gpu_gb:.0f} GB: GPT-2 124M, as in the paper, some days"
        return Next("configs/gpt2_inrun.py", reason)
    reason = f"{have} and a GPU of {gpu_gb:.0f} GB: a medium model, about an hour"
    return Next("configs/medium.py", reason)
