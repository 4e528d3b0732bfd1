"""A CLIP tokenizer that encodes every word of the lexicon as one token.

Other words are split into pieces, down to single bytes.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from scoredist3d.files import write_atomically
from scoredist3d.procedural.lexicon import lexicon

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MAX_LENGTH = 24  # start, 22 words, end
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def build_tokenizer(folder: str | Path) -> CLIPTokenizer:
    """Write a CLIP tokenizer for the captions and load it.

    Every version of transformers reads ``vocab.json`` and ``merges.txt``; version 5 writes ``tokenizer.json``. The
    padding token is the end token, which has the highest id.

    Args:
        folder: Target folder; created if absent.
    """
    from transformers import CLIPTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    characters = list(_byte_characters())
    merges = learn_merges(lexicon())
    tokens = characters + [character + _WORD_END for character in characters]
    tokens += ["".join(pair) for pair in merges] + [_START, _END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merge_lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    settings = {**special, "model_max_length": MAX_LENGTH, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_atomically(folder / "merges.txt", "\n".join(merge_lines) + "\n")
    write_atomically(folder / "special_tokens_map.json", json.dumps(special, indent=2))
    write_atomically(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
    # transformers would prefer an outdated tokenizer.json to the files just written.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair merges, learned until every word is one symbol; ties are broken alphabetically.

    The tokenizer applies the merges in the order in which they were learned, so every word becomes one token. Merges
    listed word by word would interfere with each other.
    """
    symbols = {word: [*word[:-1], word[-1] + _WORD_END] for word in words if len(word) > 1}
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for parts in symbols.values() for pair in itertools.pairwise(parts))
        if not counts:
            return merges
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        symbols = {word: _merge(parts, best) for word, parts in symbols.items()}


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _byte_characters() -> tuple[str, ...]:
    """The 256 printable characters that represent bytes in the vocabularies of GPT-2 and CLIP, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return (*(chr(byte) for byte in printable), *(chr(256 + k) for k in range(len(others))))
