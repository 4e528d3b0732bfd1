"""The pool of signs and mugs with words: content, dropout of the conditioning, latents."""

from __future__ import annotations

import pytest
import torch
from shared.flow_folder import CHANNELS, build_vae

from scoredist3d.procedural import build_tokenizer

lettered = pytest.importorskip("prior_training.lettered")
COUNT = 6


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    tokenizer = build_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    options = {"objects": COUNT, "image_size": 32, "antialias": 1, "seed": 0, "compile_": False}
    filled = lettered.LetteredPool(tokenizer, device=torch.device("cpu"), **options)
    filled.fill(0)
    return filled


def test_captions_spell_the_words(pool) -> None:  # type: ignore[no-untyped-def]
    for ids in (pool.ids_plain, pool.ids_view):
        texts = pool.tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert all(" ".join(word.lower()) in text for word, text in zip(pool.words, texts, strict=True))
    images = pool.images_at(torch.arange(COUNT))
    assert images.shape == (COUNT, 3, 32, 32) and images.amin() >= 0.0 and images.amax() <= 1.0
    assert (images.flatten(1).std(dim=1) > 0.05).all()


def test_batches_drop_captions_and_cameras(pool) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    pool.latents = None
    with pytest.raises(RuntimeError, match="call encode_with first"):
        pool.random_batch(2, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = build_vae()
    pool.encode_with(vae)
    batch = pool.random_batch(4000, generator)
    assert batch.latents.shape == (4000, CHANNELS, 4, 4) and batch.latents.dtype == torch.float32
    empty = (batch.token_ids == pool.empty_ids).all(dim=1)
    blind = ~batch.camera.any(dim=1)
    assert empty.float().mean().item() == pytest.approx(0.1 + 0.9 * 0.03, abs=0.02)
    assert blind.float().mean().item() == pytest.approx(0.2 + 0.8 * 0.03, abs=0.02)
    before = pool.words
    pool.refresh(1)
    assert pool.words != before and pool.latents is not None
