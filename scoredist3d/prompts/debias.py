"""Prompt debiasing of D-SDS (arXiv 2303.15413): removal of words that contradict a view.

A text-to-image model associates "a smiling dog" with a front view. The prompt "a smiling dog, back view" is therefore
contradictory and can lead to a second face. A masked language model identifies such words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scoredist3d.priors.part_files import check_part
from scoredist3d.priors.quiet import quiet_libraries

VIEW_WORDS = ("front", "side", "back", "overhead")
TEMPLATE = "This image is depicting a {mask} view of {prompt}"
_KEY = "prompt_processor.debias_model"


class ViewModel(Protocol):
    """A model of the probability of each view given a text."""

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Probabilities (len(prompts), 4) of :data:`VIEW_WORDS`; each row sums to one."""


def debiased_prompts(
    prompt: str, probabilities: ViewModel, *, threshold: float = 0.95, removable: Sequence[str] | None = None
) -> dict[str, str]:
    """The prompt of each view, without the words that make the view less likely.

    Let P(v) be the probability of view v given the whole prompt, and P_i(v) its probability given the prompt without
    word i. Word i is removed from the prompt of view v if P(v) / (0.5 P_i(v) + 0.5 P(v)) < ``threshold``. If all words
    would be removed, the whole prompt is kept.

    Args:
        prompt: Words separated by whitespace.
        probabilities: The model of view probabilities.
        threshold: 1 removes every word that makes a view less likely; 0 removes none.
        removable: Words that may be removed, wherever they occur; None means all words.

    Returns:
        The prompt of each view, keyed by view word.

    Raises:
        ValueError: A removable word is not in the prompt.
    """
    words = prompt.split()
    missing = [word for word in removable or () if word not in words]
    if missing:
        raise ValueError(
            f"prompt_processor.debias_words: the prompt {prompt!r} does not contain {missing[0]!r}; "
            "remove it from debias_words"
        )
    candidates = [index for index, word in enumerate(words) if removable is None or word in removable]
    shorter = [" ".join(words[:index] + words[index + 1 :]) for index in candidates]
    whole, *without = probabilities([prompt, *shorter])
    texts = {}
    for view, name in enumerate(VIEW_WORDS):
        against = {
            index
            for index, part in zip(candidates, without, strict=True)
            if float(whole[view] / (0.5 * part[view] + 0.5 * whole[view])) < threshold
        }
        kept = [word for index, word in enumerate(words) if index not in against]
        texts[name] = " ".join(kept or words)
    return texts


class MaskedLanguageModel:
    """A masked language model, e.g. bert-base-uncased, that predicts the view word in :data:`TEMPLATE`."""

    def __init__(self, name: str) -> None:
        """Load the model and the tokenizer on the CPU.

        Args:
            name: A local folder or a hub id.

        Raises:
            ValueError: The model cannot be loaded, lacks weights or a mask token, or splits a view word into several
                tokens.
        """
        import transformers

        try:
            if Path(name).is_dir():
                check_part(Path(name))
            # transformers initializes missing weights from the global random stream before it reports them.
            with quiet_libraries(), torch.random.fork_rng(devices=[]):
                # Otherwise, transformers asks on the terminal whether to run code from the folder.
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                model, info = transformers.AutoModelForMaskedLM.from_pretrained(
                    name, output_loading_info=True, trust_remote_code=False, use_safetensors=True
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{_KEY}: no masked language model can be loaded from the folder or hub id {name!r}: {first}"
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{_KEY}: {name!r} lacks weights of a masked language model, e.g. {min(info['missing_keys'])}; "
                "use a model trained for masked language modeling, such as bert-base-uncased"
            )
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"{_KEY}: {name!r} has no mask token; use a masked language model such as bert-base-uncased"
            )
        self.model: Callable[..., Any] = model.eval().requires_grad_(False)
        ids = [self.tokenizer(word, add_special_tokens=False).input_ids for word in VIEW_WORDS]
        split = [word for word, tokens in zip(VIEW_WORDS, ids, strict=True) if len(tokens) != 1]
        if split or any(tokens[0] == self.tokenizer.unk_token_id for tokens in ids):
            words = ", ".join(split) or "a view word"
            raise ValueError(f"{_KEY}: {name!r} has no single token for {words}; use a model such as bert-base-uncased")
        self._view_ids = [tokens[0] for tokens in ids]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Probabilities (len(prompts), 4) of :data:`VIEW_WORDS`, from one batched forward pass."""
        texts = [TEMPLATE.format(mask=self.tokenizer.mask_token, prompt=prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = self.model(**tokens).logits
        # The template precedes the prompt, so the first mask token is the template's even if the prompt contains one.
        place = (tokens.input_ids == self.tokenizer.mask_token_id).int().argmax(1)
        return logits[torch.arange(len(texts)), place][:, self._view_ids].double().softmax(-1)
