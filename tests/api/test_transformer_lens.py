"""Masks over TransformerLens models: HookedTransformer (until 3.x) and its successor, the bridge to transformers."""

from __future__ import annotations

import pytest
import torch
from subnets import mask_model
from torch import Tensor, nn

lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed (its models are an extra)")


def ids() -> Tensor:
    return torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))


def random_scores(name: str, weight: Tensor) -> Tensor:
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))


def check_masks(model: nn.Module, targets: object, exclude: tuple[str, ...] = ()) -> None:
    """Hooks fire, gradients reach every mask, and the hard masked model is the one with multiplied weights."""
    base = model(ids()).detach()
    masks = mask_model(model, targets, exclude, init=random_scores)
    _, cache = model.run_with_cache(ids())
    seen = []
    model.run_with_hooks(ids(), fwd_hooks=[("blocks.0.hook_resid_post", lambda value, hook: seen.append(value))])
    assert torch.equal(seen[0], cache["blocks.0.hook_resid_post"])
    assert all(row["has_effect"] for row in masks.audit(ids()))
    with masks.disabled():
        assert torch.equal(model(ids()), base)
    with masks.hard(), torch.no_grad():
        hard = model(ids())
    kept = masks.kept()
    masks.unmask()
    with torch.no_grad():
        for name, mask in kept.items():
            model.get_parameter(name).mul_(mask)
        assert torch.equal(model(ids()), hard)


def test_hooked_transformer_is_masked_over_its_raw_parameters():
    try:
        lens.HookedTransformer  # noqa: B018
    except ImportError:
        pytest.skip("this TransformerLens has no HookedTransformer (removed in 4.0)")
    shape = dict(n_layers=2, d_model=16, n_ctx=16, d_head=8, n_heads=2, d_mlp=32, d_vocab=19)
    model = lens.HookedTransformer(lens.HookedTransformerConfig(**shape, act_fn="gelu", device="cpu", seed=0))
    check_masks(model, ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"])
    masks = mask_model(model, ["W_Q"], unit="head:2")
    assert masks.layers["blocks.0.attn.W_Q"].scores.shape == (2, 1, 1)


def test_the_bridge_around_gpt2_is_masked():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    builder = pytest.importorskip(
        "transformer_lens.model_bridge.sources._bridge_builder", reason="this TransformerLens has no bridge"
    )
    if not hasattr(builder, "build_bridge_from_module"):
        pytest.skip("the bridge of this TransformerLens can't take a model at hand")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=19, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    bridge = builder.build_bridge_from_module(gpt2, "GPT2LMHeadModel", hf_config=config)
    check_masks(bridge, None, exclude=("qkv._original_component",))  # q, k and v run apart and lie in its memory
