"""The lean GPT-2 against transformers' GPT2LMHeadModel with the same weights."""

from __future__ import annotations

import pytest
import torch
from subnets.training.gpt2 import GPT2Shape, LeanGPT2, _short_attention, accuracy, lm_loss

from benchmarks.models import hugging_face_twin

pytest.importorskip("transformers")


def shaken_model(layers: int = 3) -> LeanGPT2:
    """A model whose biases and norms are not 0 and 1, so that a wrong use of them shows."""
    generator = torch.Generator().manual_seed(0)
    model = LeanGPT2(GPT2Shape(layers=layers), generator).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name in model.shape.masked_names():
                parameter.mul_(5.0)
    return model


def test_logits_and_gradients_equal_those_of_transformers() -> None:
    model = shaken_model()
    twin = hugging_face_twin(model)
    tokens = torch.randint(1001, (20, 4), generator=torch.Generator().manual_seed(1))
    logits, expected = model(tokens), twin(tokens).logits
    assert logits.std().item() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    lm_loss(model, tokens).backward()
    twin(tokens, labels=tokens).loss.backward()
    masked = set(model.shape.masked_names())
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = theirs[f"transformer.{name}"].grad
        gradient = gradient.t() if name in masked else gradient
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_attention_over_few_tokens_in_bf16_is_torchs_within_rounding() -> None:
    q, k, v = torch.randn(3, 20, 4, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    ours = _short_attention(q, k, v, 0.0)
    assert ours.dtype == torch.bfloat16 and (ours.double() - exact).abs().max() <= 8 * 2**-8 * v.abs().max()
    late = k.clone()
    late[..., 2, :] += 1.0  # what comes later is not seen
    assert torch.equal(_short_attention(q, late, v, 0.0)[..., :2, :], ours[..., :2, :])


def test_four_layers_have_196608_masked_weights_each() -> None:
    model = LeanGPT2(GPT2Shape(layers=4))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes[name] for name in model.shape.masked_names()) == 4 * 196_608
    assert sum(sizes.values()) == 4 * 198_272 + 1001 * 128 + 4 * 128 + 2 * 128


def test_initial_weights_have_std_0_02_and_come_from_the_generator() -> None:
    first, second = (LeanGPT2(GPT2Shape(layers=2), torch.Generator().manual_seed(s)) for s in (3, 3))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.ndim == 2 and a.numel() > 10_000:
            assert a.std().item() == pytest.approx(0.02, rel=0.03), name
        elif a.ndim == 1:
            assert a.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]


def test_accuracy_is_the_argmax_over_the_whole_vocabulary_at_the_separator() -> None:
    model = shaken_model(layers=1)
    sequences = torch.randint(1001, (50, 4), generator=torch.Generator().manual_seed(2))
    best = model(sequences[:, :3])[:, 2].argmax(-1)
    sequences[:30, 3] = best[:30]
    sequences[30:, 3] = (best[30:] + 1) % 1001
    assert accuracy(model, sequences) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"width": 10, "heads": 4}, "width must be a multiple of heads=4, got 10"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_shapes_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Shape(**values)
