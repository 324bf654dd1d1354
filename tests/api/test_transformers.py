"""mask_model on networks of transformers, built from tiny configs: GPT-2, BERT, ViT, ResNet."""

from __future__ import annotations

import copy

import pytest
import torch
from subnets import DiscoveryConfig, discover, mask_model, masks_of, objectives
from torch import nn

from tests.api.tiny_transformers import MODELS, made, random_scores

each_model = pytest.mark.parametrize("name", MODELS)

GPT2_PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
GPT2_WEIGHTS = {f"transformer.h.{i}.{part}.weight" for i in range(2) for part in GPT2_PARTS}


def every_layer(model: nn.Module, name: str) -> set[str]:
    """The weights that have to be masked by default: two-dimensional ones of linear layers, and filters."""
    kinds = ("Linear", "Conv1D", "Conv2d")
    head = model.get_output_embeddings()
    return {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ in kinds and m is not head}


@each_model
def test_all_layers_but_the_output_head_are_masked_and_run(name):
    model, batch = made(name)
    expected = every_layer(model, name)
    if name == "gpt2":
        assert expected == GPT2_WEIGHTS
    masks = mask_model(model)
    assert set(masks.layers) == expected
    assert all(row["runs"] == 1 for row in masks.audit(**batch) if "pooler" not in row["name"])


@each_model
def test_the_hard_masked_model_computes_what_multiplied_weights_compute_and_unmask_restores_it(name):
    model, batch = made(name)
    plain, base = copy.deepcopy(model), model(**batch).logits
    masks = mask_model(model, init=random_scores)
    kept = masks.kept()
    with torch.no_grad():
        for weight_name, mask in kept.items():
            plain.get_parameter(weight_name).mul_(mask)
    with masks.hard():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    with masks.disabled():
        assert torch.equal(model(**batch).logits, base)
    soft = model(**batch).logits
    assert not torch.equal(soft, base) and torch.equal(copy.deepcopy(model)(**batch).logits, soft)
    masks.unmask()
    assert torch.equal(model(**batch).logits, base)
    assert {type(m) for m in model.modules()} == {type(m) for m in plain.modules()}


@each_model
def test_gradients_of_the_scores_equal_those_of_multiplied_weights(name):
    model, batch = made(name)
    plain = copy.deepcopy(model)
    masks = mask_model(model, init=random_scores)
    masks.beta = 2.0
    scores = {name: layer.scores for name, layer in masks.layers.items()}
    model(**batch).logits.pow(2).mean().backward()
    leaves = {name: s.detach().clone().requires_grad_() for name, s in scores.items()}
    replaced = {name: plain.get_parameter(name).detach() * torch.sigmoid(2.0 * leaf) for name, leaf in leaves.items()}
    torch.func.functional_call(plain, replaced, (), batch).logits.pow(2).mean().backward()
    for weight_name, leaf in leaves.items():
        size = leaf.grad.abs().max()
        assert size > 0 and (scores[weight_name].grad - leaf.grad).abs().max() <= 2e-5 * size


@each_model
def test_save_pretrained_keeps_the_base_weights_for_from_pretrained(name, tmp_path):
    model, batch = made(name)
    base = model(**batch).logits
    masks = mask_model(model, init=random_scores)
    masks.beta = 3.0
    masks.adamw(lam=1e-3)
    masked = model(**batch).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, base)
    from safetensors.torch import load_file

    # the file holds the scores too, under the names that transformers gives to files
    saved = [value for key, value in load_file(tmp_path / "model.safetensors").items() if key.endswith(".scores")]
    assert len(saved) == len(masks.layers)
    assert all(any(torch.equal(value, s) for value in saved) for s in masks.scores().values())
    loaded = mask_model(again)
    again.load_state_dict(model.state_dict())
    loaded.beta = 3.0
    assert torch.equal(again(**batch).logits, masked)


@each_model
def test_discover_by_kl_needs_no_labels_and_leaves_the_model_as_it_was(name):
    model, batch = made(name)
    if name != "resnet":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4)  # weights of .02 make an output that hardly depends on any mask
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = DiscoveryConfig(epochs=3, steps_per_epoch=4, lr=0.05, lam=1e-7)
    found = discover(model, lambda epoch: [batch] * 4, objectives.kl_to_unmasked, config)
    assert found.history[2]["step"] == 12 and 0 < found.history[2]["density"] < 1
    assert found.history[2]["loss"] < found.history[0]["loss"]
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], value) for key, value in state.items())
    assert all(module.training for module in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert set(found.subnet.masks) <= {n for n, _ in model.named_parameters()}


def test_gpt2_generates_with_a_mask_the_same_tokens_with_and_without_cache():
    model, batch = made("gpt2")
    base = model.generate(**batch, max_new_tokens=5, do_sample=False)
    masks = mask_model(model, init=random_scores)
    cached = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(**batch, max_new_tokens=5, do_sample=False, use_cache=False))
    ids = batch["input_ids"]
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    stopped = (cached[:, 7:] == 0).cumsum(1).bool()  # after the end token comes padding
    assert torch.equal(cached[:, 7:][~stopped], ids[:, 7 : cached.shape[1]][~stopped])
    with masks.disabled():
        assert torch.equal(model.generate(**batch, max_new_tokens=5, do_sample=False), base)


def test_gpt2_output_head_and_embedding_are_tied_and_share_one_mask():
    model, batch = made("gpt2")
    plain = copy.deepcopy(model)
    masks = mask_model(model, ["lm_head"], init=random_scores)
    assert list(masks.layers) == ["transformer.wte.weight"]
    with torch.no_grad():
        plain.transformer.wte.weight.mul_(masks.kept()["transformer.wte.weight"])
    assert plain.lm_head.weight is plain.transformer.wte.weight
    with masks.hard():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    masks.beta = 2.0
    model(**batch).logits.pow(2).mean().backward()
    leaf = masks.layers["transformer.wte.weight"].scores.detach().clone().requires_grad_()
    reference, _ = made("gpt2")
    w_eff = reference.transformer.wte.weight.detach() * torch.sigmoid(2.0 * leaf)
    torch.func.functional_call(reference, {"transformer.wte.weight": w_eff}, (), batch).logits.pow(2).mean().backward()
    grad = masks.layers["transformer.wte.weight"].scores.grad
    assert (grad - leaf.grad).abs().max() <= 2e-5 * leaf.grad.abs().max() > 0


def test_part_of_gpt2_is_masked_by_names():
    model, _ = made("gpt2")
    masks = mask_model(model, ["c_attn", "c_fc"])
    assert set(masks.layers) == {n for n in GPT2_WEIGHTS if "c_attn" in n or "c_fc" in n}


def test_kl_to_unmasked_leaves_padding_out():
    model, batch = made("gpt2")
    mask_model(model, init=random_scores)
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    mask[1, 4:] = 0
    padded = {"input_ids": ids.clone(), "attention_mask": mask, "labels": ids}
    padded["input_ids"][1, 4:] = 3
    rows = [objectives.kl_to_unmasked(model, {"input_ids": ids[:1]}), objectives.kl_to_unmasked(model, ids[1:, :4])]
    expected = (7 * rows[0] + 4 * rows[1]) / 11
    assert torch.allclose(objectives.kl_to_unmasked(model, padded), expected, rtol=1e-4)
    assert not torch.allclose(rows[0], rows[1], rtol=1e-2)


def test_bfloat16_models_keep_fp32_scores_and_train():
    model, batch = made("gpt2")
    masks = mask_model(model.to(torch.bfloat16))
    optimizer = masks.adamw(lr=0.1, lam=1e-3)
    before = {name: s.detach().clone() for name, s in masks.scores().items()}
    model(**batch).logits.float().pow(2).mean().backward()
    optimizer.step()
    for name, scores in masks.scores().items():
        assert scores.dtype == torch.float32 and not torch.equal(scores, before[name])
    masks.check_fresh()
    assert masks_of(model).layers.keys() == masks.layers.keys()
