"""Prompt debiasing of D-SDS (arXiv 2303.15413): leave out the words of a prompt that speak against a view.

"a smiling dog" is a front view to a text-to-image model, so "a smiling dog, back view" contradicts itself and grows a
second face. A masked language model tells which words do that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from scoredist3d.priors.quiet import quiet_libraries

VIEW_WORDS = ("front", "side", "back", "overhead")
TEMPLATE = "This image is depicting a {mask} view of {prompt}"
_KEY = "prompt_processor.debias_model"


class ViewModel(Protocol):
    """Says how likely each view is for texts."""

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(len(prompts), 4), probabilities of :data:`VIEW_WORDS`, summing to one."""


def debiased_prompts(
    prompt: str, probabilities: ViewModel, *, threshold: float = 0.95, removable: Sequence[str] | None = None
) -> dict[str, str]:
    """The prompt of each view without the words that speak against it.

    With P(v) the probability of view v given the whole prompt and P_i(v) that given the prompt without word i, view v
    loses word i where P(v) / (0.5 P_i(v) + 0.5 P(v)) < ``threshold``, as in the code of the reference framework: the
    word makes the view less likely. A view that would lose all of its words keeps them.

    Args:
        prompt: Words between blanks.
        probabilities: The language model.
        threshold: 1 takes out every word that makes a view less likely at all, 0 none.
        removable: The words that may go, wherever they stand; all by default.

    Returns:
        Text by view word.

    Raises:
        ValueError: A removable word that the prompt does not hold.
    """
    words = prompt.split()
    missing = [word for word in removable or () if word not in words]
    if missing:
        raise ValueError(f"prompt_processor.debias_words: the prompt {prompt!r} has no word {missing[0]!r}")
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
    """Probabilities of the view words at the mask of :data:`TEMPLATE`, from a model such as bert-base-uncased."""

    def __init__(self, name: str) -> None:
        """Load model and tokenizer on the CPU.

        Args:
            name: A local folder or a hub id.

        Raises:
            ValueError: It cannot be loaded, lacks weights, has no mask, or has no single token for a view word.
        """
        import transformers

        try:
            # Weights that the file lacks are drawn from the global random stream before they can be reported.
            with quiet_libraries(), torch.random.fork_rng(devices=[]):
                # Without trust_remote_code=False, transformers asks on the terminal whether to run code of the folder.
                self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
                model, info = transformers.AutoModelForMaskedLM.from_pretrained(
                    name, output_loading_info=True, trust_remote_code=False
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{_KEY}: {name!r} is no folder or hub id of a masked language model that loads: {first}"
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{_KEY}: {name!r} lacks weights of a masked language model, e.g. {min(info['missing_keys'])}"
            )
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"{_KEY}: {name!r} has no mask token; take a masked language model such as bert-base-uncased"
            )
        self.model: Callable[..., Any] = model.eval().requires_grad_(False)
        ids = [self.tokenizer(word, add_special_tokens=False).input_ids for word in VIEW_WORDS]
        split = [word for word, tokens in zip(VIEW_WORDS, ids, strict=True) if len(tokens) != 1]
        if split or any(tokens[0] == self.tokenizer.unk_token_id for tokens in ids):
            words = ", ".join(split) or "a view word"
            raise ValueError(f"{_KEY}: {name!r} has no single token for {words}; take one such as bert-base-uncased")
        self._view_ids = [tokens[0] for tokens in ids]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(len(prompts), 4), from one batched forward pass."""
        texts = [TEMPLATE.format(mask=self.tokenizer.mask_token, prompt=prompt) for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        logits = self.model(**tokens).logits
        # The template begins every text, so its mask is the first one whatever the prompt holds.
        place = (tokens.input_ids == self.tokenizer.mask_token_id).int().argmax(1)
        return logits[torch.arange(len(texts)), place][:, self._view_ids].double().softmax(-1)
