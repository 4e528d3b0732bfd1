"""Prompt processing, which converts a prompt and cameras to the conditionings that guidance combines."""

from scoredist3d.prompts.processor import ExtraPrompt, PromptProcessor

__all__ = ["ExtraPrompt", "PromptProcessor"]
