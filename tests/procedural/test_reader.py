"""The reader: shapes, decoding, saving and loading, and its training stage in miniature."""

import json
from pathlib import Path

import pytest
import torch
import train_reader
from prior_training.reader import LetteredPool, shifted, soften

from scoredist3d.procedural.fonts import draw_text
from scoredist3d.procedural.reader import BLANK, Reader, character_accuracy, edit_distance, exact_match
from scoredist3d.procedural.words import is_held_out


def _reader(width: int = 8) -> Reader:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Reader(width=width)


def test_size_and_shapes():
    assert sum(p.numel() for p in _reader(24).parameters()) <= 500_000
    reader = _reader()
    images = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    scores = reader(images)
    assert scores.shape == (2, 64, 37)
    assert torch.allclose(scores.exp().sum(-1), torch.ones(2, 64), atol=1e-4)
    assert reader(images[:1, ::2, ::2]).shape == (1, 64, 37)
    assert all(isinstance(word, str) for word in reader.read(images))


def test_decoding_merges_repeated_columns_and_drops_blanks(monkeypatch):
    reader = _reader()
    best = torch.tensor([[BLANK, 1, 1, BLANK, 1, 2, 2, BLANK], [BLANK] * 8])
    monkeypatch.setattr(Reader, "forward", lambda self, images: torch.nn.functional.one_hot(best, 37).float())
    assert reader.read(torch.zeros(2, 8, 8, 3)) == ["AAB", ""]


def test_loss_is_small_for_the_scored_word(monkeypatch):
    reader = _reader()
    columns, _ = reader.encode(["AB"])
    best = torch.tensor([[BLANK, int(columns[0]), BLANK, int(columns[1])]])
    scores = torch.nn.functional.one_hot(best, 37).float().mul(20).log_softmax(-1)
    monkeypatch.setattr(Reader, "forward", lambda self, images: scores)
    assert float(reader.loss(torch.zeros(1, 8, 8, 3), ["ab"])) < 0.1
    assert float(reader.loss(torch.zeros(1, 8, 8, 3), ["AC"])) > 1.0
    with pytest.raises(ValueError, match="cannot read"):
        reader.loss(torch.zeros(1, 8, 8, 3), ["A-C"])


def test_metrics():
    assert edit_distance("KITTEN", "SITTING") == 3
    assert edit_distance("", "AB") == 2
    assert exact_match(["TEA", "CAP"], ["tea", "CUP"]) == 0.5
    assert character_accuracy(["TEA", "CAP"], ["TEA", "CUP"]) == pytest.approx(5 / 6)
    assert character_accuracy(["XXXXXXXX"], ["AB"]) == 0.0


def test_it_learns_to_read_two_words():
    reader = _reader()
    words = ["AB", "7X"]
    images = draw_text(words, 0, 128, 128, margin=0.2)[..., None].expand(-1, -1, -1, 3)
    optimizer = torch.optim.Adam(reader.parameters(), lr=4e-3)
    for _ in range(150):
        if reader.read(images) == words:
            break
        loss = reader.loss(images, words).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert reader.read(images) == words


def test_degradations_keep_shape_and_range():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(8, 3, 32, 32, generator=generator)
    flat = torch.full((8, 3, 32, 32), 0.5)
    for result in (soften(image, generator), shifted(image, generator)):
        assert result.shape == image.shape
        assert float(result.min()) >= 0 and float(result.max()) <= 1
    assert torch.allclose(shifted(flat, generator), flat, atol=1e-5)
    # Blurred images have less contrast, and no channel leaks into another.
    red = torch.zeros(16, 3, 32, 32)
    red[:, 0, ::2] = 1.0
    soft = soften(red, generator)
    assert float(soft[:, 0].std()) < float(red[:, 0].std())
    assert float(soft[:, 1].mean()) < 0.2


def test_pool_has_words_of_its_split():
    pool = LetteredPool(3, image_size=16, antialias=1, seed=1, device=torch.device("cpu"), held_out=True)
    pool.fill(0)
    assert all(map(is_held_out, pool.words))
    first = pool.rgba.clone()
    pool.fill(1)
    assert not torch.equal(first, pool.rgba)
    pool.fill(0)
    assert torch.equal(first, pool.rgba)


def test_training_script_in_miniature(tmp_path: Path):
    arguments = ["--miniature", "--device", "cpu", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert train_reader.main(arguments) == 0
    report = json.loads((tmp_path / "work" / "reader.json").read_text())
    assert set(report["held_out"]) == {"exact", "characters"}
    weights = (tmp_path / "out" / "reader.safetensors").read_bytes()
    # The second run resumes at the end and changes nothing.
    assert train_reader.main(arguments) == 0
    assert (tmp_path / "out" / "reader.safetensors").read_bytes() == weights
    reader = Reader.load(tmp_path / "out")
    assert reader.width == 8
    assert not any(p.requires_grad for p in reader.parameters())


def test_save_and_load_keep_the_reading(tmp_path: Path):
    reader = _reader()
    reader.save(tmp_path)
    images = torch.rand(2, 128, 128, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Reader.load(tmp_path)(images), reader(images), atol=0.05)
    with pytest.raises(FileNotFoundError, match="contains no reader"):
        Reader.load(tmp_path / "absent")
