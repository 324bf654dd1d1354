"""mask_model and MaskSet: what is masked, refused and put back; penalty, optimizer, schedule, compilation."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings

import pytest
import torch
from subnets import MaskedConv2d, MaskedLinear, mask_model, masks_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from subnet_kernels import use_backend
from subnet_kernels.backends import native
from subnet_kernels.backends.native import NativeBackend
from subnet_kernels.optim import MaskAdamW

EPS32 = 2.0**-23


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def random_scores(name: str, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + weight.numel())
    return torch.randn(weight.shape, generator=generator)


def inputs(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- what is masked --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem, two blocks, an output head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "up": nn.Linear(4, 8)}) for _ in range(2))
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


TARGETS = [
    (None, (), ["stem", "blocks.0.q", "blocks.0.up", "blocks.1.q", "blocks.1.up"]),
    ("all-linear", (), ["blocks.0.q", "blocks.0.up", "blocks.1.q", "blocks.1.up"]),
    ("all-conv", (), ["stem"]),
    (nn.Conv2d, (), ["stem"]),
    ([nn.Conv2d, "q"], (), ["stem", "blocks.0.q", "blocks.1.q"]),
    (r"blocks\.\d+\.up", (), ["blocks.0.up", "blocks.1.up"]),
    (["up.weight"], (), ["blocks.0.up", "blocks.1.up"]),
    (["blocks.1.q"], (), ["blocks.1.q"]),
    (None, r"blocks\.0\..*", ["stem", "blocks.1.q", "blocks.1.up"]),
    (None, ["stem", "q"], ["blocks.0.up", "blocks.1.up"]),
    (None, [nn.Linear], ["stem"]),
]  # fmt: skip


@pytest.mark.parametrize("targets, exclude, expected", TARGETS)
def test_targets_and_exclude_name_layers_by_regex_name_type_or_family(targets, exclude, expected):
    model = Net()
    masks = mask_model(model, targets, exclude)
    assert list(masks.layers) == [f"{name}.weight" for name in expected]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{name}.scores" for name in expected}
    assert list(masks_of(model).layers) == list(masks.layers)


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


REFUSED = [
    (lambda: Net(), dict(targets="blocks.9.q"), "match nothing.*stem .Conv2d.*blocks.0.q .Linear."),
    (lambda: Net(), dict(targets=["q"], exclude=["q"]), "match nothing"),
    (lambda: nn.Sequential(nn.ReLU()), {}, "match nothing.*nothing by default"),
    (lambda: Net(), dict(targets=["q", "qq", nn.GELU]), r"targets \['qq', <class .*GELU'>\] match nothing"),
    (lambda: Net(), dict(targets=["head"], exclude=["embedding"]), r"head.weight is tied to embedding.weight"),
    (lambda: Net(), dict(targets=[nn.GELU, "norm"]), r"targets .* match nothing"),
    (lambda: Net(), dict(targets="(blocks"), "not a regular expression"),
    (lambda: mlp(), dict(score_init=float("inf")), "score_init must be finite"),
    (lambda: mlp(), dict(unit=(2, 2)), "must divide"),  # the third layer's: the first two are put back
    (lambda: mlp(), dict(unit=(5, 2)), "must divide"),
    (lambda: mlp(), dict(kind="soft"), "kind must be one of"),
    (lambda: mlp(), dict(init={"2.weight": torch.zeros(3)}), r"must have shape \[8, 8\], got \[3\]"),
    (lambda: mlp(), dict(init=lambda n, w: torch.full(w.shape, float("nan"))), "initial scores must be finite"),
]  # fmt: skip


@pytest.mark.parametrize("new, arguments, message", REFUSED)
def test_what_cannot_be_masked_is_refused_in_words_and_leaves_the_model_as_it_was(new, arguments, message):
    model = new()
    kinds = [type(module) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        mask_model(model, **arguments)
    assert [type(module) for module in model.modules()] == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert set(after) == set(state) and all(torch.equal(after[name], value) for name, value in state.items())


def test_a_transformer_layer_is_masked_around_after_it_is_excluded():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2, 8))
    assert list(mask_model(model, exclude=r"1\..*").layers) == ["0.weight"]


def test_arguments_of_another_form_are_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        mask_model("gpt2")
    for bad in (3, [3], {"a": 1}.items()):
        with pytest.raises(TypeError, match="targets must be"):
            mask_model(mlp(), bad)


def test_a_masked_model_is_refused_and_a_diverged_weight_is_named():
    model = mlp()
    mask_model(model)
    with pytest.raises(ValueError, match=r"masked already \(first masked layer: 0\)"):
        mask_model(model)
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mask_model: 2: its weight has NaN"):
        mask_model(model)
    assert all(type(layer) is nn.Linear for layer in model if not isinstance(layer, nn.ReLU))
    with pytest.raises(ValueError, match="no masked layer; make it one with mask_model"):
        masks_of(model)


def test_a_model_that_is_one_layer_is_masked_under_the_name_of_its_weight():
    model = nn.Linear(3, 2)
    masks = mask_model(model, init={"weight": torch.ones(2, 3)})
    assert list(masks.layers) == ["weight"] and list(masks.scores()) == ["scores"] and masks.density() == 1.0


# --- masking and unmasking -------------------------------------------------------------------------------------------


def test_masking_keeps_identities_names_hooks_and_unmask_puts_everything_back():
    model = mlp()
    model[2].bias.requires_grad_(False)
    model.train()
    model[4].eval()
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    dictionaries = [set(vars(module)) for module in model.modules()]
    keys, modes, modules = list(model.state_dict()), [m.training for m in model.modules()], list(model.modules())
    x = inputs()
    base = model(x)
    masks = mask_model(model, init=random_scores)
    assert [key for key in model.state_dict() if not key.endswith("scores")] == keys
    assert list(model.modules()) == modules and isinstance(model[0], nn.Linear)
    assert not torch.equal(model(x), base) and calls == ["hook", "hook"]
    with masks.disabled():
        assert torch.equal(model(x), base)
    assert masks.unmask() is model
    assert torch.equal(model(x), base) and list(model.state_dict()) == keys
    assert [set(vars(module)) for module in model.modules()] == dictionaries
    assert [m.training for m in model.modules()] == modes and all(type(model[i]) is nn.Linear for i in (0, 2, 4))
    for name, parameter in model.named_parameters():
        same, value, requires_grad = before[name]
        assert parameter is same and torch.equal(parameter, value) and parameter.requires_grad == requires_grad
    assert calls == ["hook"] * 4


def test_unmask_can_keep_the_hard_mask_in_the_weights():
    model = mlp()
    masks = mask_model(model, init=random_scores)
    x = inputs()
    with masks.hard():
        hard = model(x)
    kept = masks.kept()
    masks.unmask(keep="masked")
    assert torch.equal(model(x), hard)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in kept.items())
    with pytest.raises(ValueError, match="keep must be 'base' or 'masked'"):
        mask_model(model).unmask(keep="soft")


def test_copies_and_files_of_a_masked_model_bring_masks_beta_and_schedule_along():
    model = mlp()
    masks = mask_model(model, init=random_scores)
    masks.anneal(to=16, steps=4)
    masks.adamw(lam=1e-3)
    masks.step()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = inputs()
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        again = masks_of(twin)
        assert again.state_dict() == masks.state_dict() and again.beta == 2.0
        assert torch.equal(twin(x), model(x))
        assert len({id(layer.beta) for layer in again.layers.values()}) == 1
        again.step()
        assert (again.beta, masks.beta) == (4.0, 2.0)
        again.unmask()
        assert [p.requires_grad for p in twin.parameters()] == [True] * 6


def test_a_copy_made_inside_disabled_is_masked_since_no_block_would_end_it():
    model, x, file = mlp(), inputs(), io.BytesIO()
    masks = mask_model(model, init=random_scores)
    out = model(x)
    with masks.disabled():
        twin = copy.deepcopy(model)
        torch.save(model, file)
    file.seek(0)
    assert torch.equal(twin(x), out) and torch.equal(torch.load(file, weights_only=False)(x), out)


def test_maskset_state_dict_round_trip_and_refusals():
    masks = mask_model(mlp())
    masks.anneal(start=2.0, to=32.0, steps=2, every=1)
    masks.step()
    masks.harden()
    state = masks.state_dict()
    other = mask_model(mlp())
    other.load_state_dict(state)
    assert other.beta == 8.0 and other.is_hard and other.state_dict() == state
    for bad in ({**state, "beta": float("nan")}, {**state, "beta": -1.0}, {"beta": 1.0}):
        with pytest.raises(ValueError):
            other.load_state_dict(bad)
        assert other.state_dict() == state


def test_hand_built_nets_share_one_beta_and_disagreeing_layers_are_refused():
    net = nn.Sequential(MaskedConv2d(1, 2, 3), nn.Flatten(), MaskedLinear(8, 2))
    masks = masks_of(net)
    masks.beta = 5.0
    assert float(net[0].beta) == float(net[2].beta) == 5.0 and net[0].beta is net[2].beta
    net = nn.Sequential(MaskedLinear(2, 2), MaskedLinear(2, 2))
    masks_of(net[0]).beta = 2.0
    with pytest.raises(ValueError, match=r"disagree: beta 2.0 and 1.0"):
        masks_of(net)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_bad_beta_is_refused_and_the_old_one_stays(bad):
    masks = mask_model(mlp())
    masks.beta = 3.0
    with pytest.raises(ValueError, match=r"MaskSet\.beta"):
        masks.beta = bad
    with pytest.raises(ValueError, match=r"MaskSet\.anneal"):
        masks.anneal(to=bad, steps=3)
    assert masks.beta == 3.0


def test_density_undecided_and_subnet_count_weights_not_scores():
    masks = mask_model(nn.Linear(4, 2), unit="row", init={"weight": torch.tensor([[1.0], [-9.0]])})
    assert masks.density() == 0.5 and masks.density(per_layer=True) == {"weight": 0.5}
    assert masks.undecided() == 0.5  # sigmoid(1) lies between .01 and .99, sigmoid(-9) does not
    assert masks.subnet(task="t").masks["weight"].tolist() == [[True] * 4, [False] * 4]
    assert masks.subnet(task="t").provenance["task"] == "t"
    masks.layers["weight"].scores.data[0] = float("nan")
    with pytest.raises(ValueError, match="not finite in scores"):
        masks.subnet()


def test_audit_finds_a_masked_layer_that_never_runs():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    model.forward = lambda x: model[0](x)
    rows = mask_model(model).audit(inputs())
    assert [(row["name"], row["runs"], row["has_effect"]) for row in rows] == [
        ("0.weight", 1, True), ("1.weight", 0, False),
    ]  # fmt: skip


# --- the penalty -----------------------------------------------------------------------------------------------------


def soft_sum(masks) -> Tensor:
    """The penalty by its definition."""
    return sum(
        torch.sigmoid(masks.beta * layer.scores).sum() * layer.weights_per_score for layer in masks.layers.values()
    )


@pytest.mark.parametrize("unit", ["weight", "row", "column"])
@pytest.mark.parametrize("num_micro_batches", [1, 3])
def test_mask_adamw_with_lam_equals_torch_adamw_on_the_penalised_loss_over_50_steps(unit, num_micro_batches):
    """In fp64, so that 50 steps of Adam (which divides by small numbers) leave only rounding."""
    lam, results = 1e-3, []
    for is_ours in (True, False):
        model = mlp(torch.float64)
        masks = mask_model(model, unit=unit, score_init=0.05)
        masks.beta = 4.0
        scores = list(masks.scores().values())
        settings = dict(lr=1e-2, weight_decay=0.1)
        optimizer = masks.adamw(**settings, lam=lam) if is_ours else torch.optim.AdamW(scores, **settings)
        for step in range(50):
            for part in range(num_micro_batches):
                x = inputs(10 * step + part, torch.float64)
                (model(x).pow(2).mean() / num_micro_batches).backward()
            if not is_ours:
                (lam * soft_sum(masks)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([score.detach().clone() for score in scores])
    for ours, theirs in zip(*results, strict=True):
        assert not torch.equal(ours, torch.full_like(ours, 0.05))
        assert (ours - theirs).abs().max() <= 50 * 64 * 2.0**-53 * theirs.abs().max()


def test_a_lam_in_a_tensor_equals_the_float_may_change_in_place_and_is_not_read_on_the_host():
    lams, results = [1e-3, 1e-3, 0.5, 0.0, 2e-2], []
    for is_tensor in (False, True):
        masks = mask_model(mlp(), unit="row", score_init=0.05)
        lam = torch.tensor(0.0) if is_tensor else 0.0
        optimizer = masks.adamw(lr=1e-2, lam=lam, capturable=True)
        for step, value in enumerate(lams):
            if is_tensor:
                lam.fill_(value)
            else:
                optimizer.param_groups[0]["lam"] = value
            masks.model(inputs(step)).pow(2).mean().backward()
            with use_backend("reference"), NoReads() if is_tensor else contextlib.nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        results.append([scores.detach() for scores in masks.scores().values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    state = optimizer.state_dict()
    lam.fill_(7.0)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lam"] is lam and lam.item() == 7.0  # state_dict holds the tensor itself
    optimizer.load_state_dict(copy.deepcopy({**state, "param_groups": [{**state["param_groups"][0], "lam": 0.25}]}))
    assert optimizer.param_groups[0]["lam"] is lam and lam.item() == 0.25


@pytest.mark.parametrize(
    "lam, words",
    [
        (torch.ones(1), "1 values of lam, one per mask, need scores of 1 masks"),
        (torch.ones(1, 1), "a tensor lam must be 0-d, floating-point and on the scores' device"),
        (torch.tensor(1), "a tensor lam must be 0-d, floating-point and on the scores' device"),
        (torch.zeros((), device="meta"), "a tensor lam must be 0-d, floating-point and on the scores' device"),
    ],
)
def test_a_lam_in_a_tensor_of_another_form_is_refused(lam, words):
    with pytest.raises(ValueError, match=words):
        mask_model(mlp()).adamw(lam=lam)
    with pytest.raises(ValueError, match="lam=a tensor needs masked layers' scores"):
        MaskAdamW([nn.Parameter(torch.ones(1))], lam=torch.tensor(0.1))


def test_capturable_reaches_torchs_adamw():
    masks = mask_model(mlp())
    assert [group["capturable"] for group in masks.adamw(capturable=True).param_groups] == [True]
    assert [group["capturable"] for group in masks.adamw().param_groups] == [False]


def pushed(optimizer: MaskAdamW, scores: Tensor) -> Tensor:
    """The gradient that the first step of AdamW worked with."""
    return optimizer.state[scores]["exp_avg"] / (1 - 0.9)


def test_mask_adamw_pushes_a_score_without_gradient_and_leaves_other_parameters_to_adamw():
    masks = mask_model(nn.Linear(2, 2), score_init=0.0)
    masks.beta = 2.0
    other = nn.Parameter(torch.ones(2))
    optimizer = MaskAdamW([*masks.scores().values(), other], lr=0.1, weight_decay=0.0, lam=0.5)
    optimizer.step()
    scores = masks.scores()["scores"]
    assert (pushed(optimizer, scores) - 0.5 * 2.0 * 0.25).abs().max() <= 4 * EPS32  # lam * beta * m * (1 - m)
    assert torch.allclose(scores.detach(), torch.full((2, 2), -0.1)) and torch.equal(other, torch.ones(2))


@pytest.mark.parametrize("arguments, error", [
    (dict(lam=-1.0), ValueError), (dict(lam=float("nan")), ValueError),
    (dict(moment_dtype=torch.float16), ValueError),
])  # fmt: skip
def test_mask_adamw_refuses_what_it_cannot_do(arguments, error):
    with pytest.raises(error, match="MaskAdamW"):
        mask_model(mlp()).adamw(**arguments)
    optimizer = MaskAdamW([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="lam must be finite"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lam": -2.0})


def test_collect_penalty_equals_the_optimizers_lam_and_the_definition():
    lam, gradients = 1e-2, []
    for way in ("collect", "lam", "definition"):
        model = mlp()
        masks = mask_model(model, init=random_scores)
        masks.beta = 2.0
        if way == "collect":
            with masks.collect_penalty() as penalty:
                loss = model(inputs()).pow(2).mean()
            total = penalty()
            assert total.dim() == 0
            assert (total - soft_sum(masks)).detach().abs() <= 136 * EPS32 * total.detach()
            (loss + lam * total).backward()
        elif way == "lam":
            model(inputs()).pow(2).mean().backward()
            optimizer = masks.adamw(lr=0.0, weight_decay=0.0, lam=lam)
            optimizer.step()
            gradients.append([pushed(optimizer, scores) for scores in masks.scores().values()])
            continue
        else:
            (model(inputs()).pow(2).mean() + lam * soft_sum(masks)).backward()
        gradients.append([scores.grad for scores in masks.scores().values()])
    for collected, in_optimizer, defined in zip(*gradients, strict=True):
        size = defined.abs().max()
        assert (collected - defined).abs().max() <= 8 * EPS32 * size
        assert (in_optimizer - defined).abs().max() <= 8 * EPS32 * size


def test_collect_penalty_counts_a_layer_once_and_adds_the_one_that_did_not_run():
    model = nn.ModuleDict({"twice": nn.Linear(4, 4), "never": nn.Linear(4, 4), "coarse": nn.Linear(4, 6)})
    masks = mask_model(model, unit="row", init=lambda n, w: torch.full((w.shape[0], 1), 0.3))
    masks.beta = 2.0
    x = torch.randn(3, 4)
    with masks.collect_penalty() as penalty:
        out = model["coarse"](model["twice"](model["twice"](x)))
    total = penalty()
    m = torch.sigmoid(torch.tensor(0.6))
    assert (total - 56 * m).detach().abs() <= 56 * EPS32
    (out.sum() * 0 + total).backward()
    slope = float(2 * m * torch.sigmoid(torch.tensor(-0.6)))
    for name, count in (("twice", 4), ("never", 4), ("coarse", 4)):
        assert torch.allclose(model[name].scores.grad, torch.tensor(count * slope), rtol=8 * EPS32)


def test_collect_penalty_refuses_misuse_and_names_the_cure():
    model = mlp()
    masks = mask_model(model)
    with masks.collect_penalty(), pytest.raises(RuntimeError, match="entered twice"), masks.collect_penalty():
        pass
    with masks.disabled(), pytest.raises(RuntimeError, match="leave disabled"), masks.collect_penalty():
        pass
    with masks.collect_penalty(), torch.no_grad(), pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(inputs())
    with masks.collect_penalty() as penalty:
        model(inputs())
    penalty()
    with pytest.raises(RuntimeError, match="called twice"):
        penalty()
    with masks.collect_penalty() as penalty:  # usable again after every one of these
        model(inputs())
    penalty().backward()


def test_collect_penalty_works_with_non_reentrant_checkpointing_and_refuses_the_reentrant_one():
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for is_checkpointed in (False, True):
        model = mlp()
        masks = mask_model(model, init=random_scores)
        x = inputs().requires_grad_()
        with masks.collect_penalty() as penalty:
            out = checkpoint(model, x, use_reentrant=False) if is_checkpointed else model(x)
        (out.pow(2).sum() + 0.1 * penalty()).backward()
        gradients.append([scores.grad for scores in masks.scores().values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with masks.collect_penalty(), pytest.raises(RuntimeError, match="use_reentrant=False"):
        checkpoint(model, x, use_reentrant=True)


def test_nothing_that_is_not_a_leaf_stays_on_a_module_after_collect_penalty():
    model = mlp()
    masks = mask_model(model)
    with masks.collect_penalty() as penalty:
        model(inputs()).sum()
    penalty()
    copy.deepcopy(model)  # a non-leaf tensor would raise here
    assert masks._state.penalties is None


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every, expected", [(1, [1, 2, 4, 8, 16, 16, 16]), (2, [1, 1, 4, 4, 16, 16, 16])])
@pytest.mark.parametrize("has_plain_adamw", [True, False])
def test_anneal_advances_once_per_step_of_masks_adamw(every, expected, has_plain_adamw):
    model = mlp()
    masks = mask_model(model)
    if has_plain_adamw:
        torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # wraps AdamW.step, and with it the one that ours calls
    masks.beta = 7.0
    masks.anneal(start=1.0, to=16.0, steps=4, every=every)
    optimizer = masks.adamw()
    betas = []
    for step in range(7):
        betas.append(masks.beta)
        model(inputs(step)).sum().backward()
        optimizer.step()
        masks.check_fresh()
    assert betas == pytest.approx(expected, rel=EPS32)


class NoReads(TorchDispatchMode):
    """Refuses to bring a tensor's value to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in func.name(), "a tensor's value was read on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("start, to, steps, every", [(1.0, 200.0, 7, 1), (0.5, 100.0, 10, 3), (3.0, 3.0, 4, 5)])
def test_a_schedule_on_the_device_gives_the_values_of_the_one_on_the_host_and_reads_none(start, to, steps, every):
    betas = []
    for on_device in (False, True):
        model = mlp()
        masks = mask_model(model)
        masks.anneal(start, to, steps=steps, every=every, on_device=on_device)
        assert masks._state.schedule.is_on_device == on_device
        betas.append([masks.beta])
        for _ in range(steps + 3):
            model(inputs())  # fills the slots, which must notice
            with NoReads():
                masks.step()
            masks.check_fresh()
            betas[-1].append(masks.beta)
    assert betas[0][0] == start and betas[0][steps:] == [to] * 4
    assert betas[1] == pytest.approx(betas[0], rel=EPS32)
    if start != to:
        assert len(set(betas[0])) == len(set(betas[1])) == steps // every + 1 + (steps % every > 0)


def test_a_schedule_on_the_device_follows_copies_files_state_dicts_and_devices():
    model = mlp()
    masks = mask_model(model, init=random_scores)
    masks.anneal(to=16, steps=4, on_device=True)
    masks.step()
    state = masks.state_dict()
    assert state["schedule"] == {
        "start": 1.0, "to": 16.0, "steps": 4, "every": 1, "count": 1, "on_device": True
    } and type(state["schedule"]["count"]) is int  # fmt: skip
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = mlp()
    mask_model(loaded).load_state_dict(state)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), loaded):
        again = masks_of(twin)
        again.step()
        assert (again.beta, masks.beta) == (4.0, 2.0) and again._state.schedule.is_on_device
    count = masks._state.schedule.count
    masks.step()
    masks.load_state_dict(state)
    assert masks._state.schedule.count is count and count.item() == 1  # in place, for a captured graph
    old = {**state, "schedule": {k: v for k, v in state["schedule"].items() if k != "on_device"}}
    masks.load_state_dict(old)
    assert masks._state.schedule.count == 1 and not masks._state.schedule.is_on_device


def test_with_another_optimizer_the_schedule_advances_by_masks_step():
    masks = mask_model(mlp())
    masks.anneal(to=4, steps=2)
    optimizer = torch.optim.SGD(masks.scores().values(), lr=0.1)
    optimizer.step()
    assert masks.beta == 1.0
    masks.step()
    assert masks.beta == 2.0


def test_the_penalty_in_the_optimizer_is_taken_at_the_beta_of_the_forward_pass():
    masks = mask_model(nn.Linear(2, 2), score_init=0.0)
    masks.anneal(start=2.0, to=8.0, steps=1)
    optimizer = masks.adamw(lr=0.0, weight_decay=0.0, lam=1.0)
    optimizer.step()
    assert (pushed(optimizer, masks.scores()["scores"]) - 2.0 * 0.25).abs().max() <= 4 * EPS32 and masks.beta == 8.0


# --- memory and launches ---------------------------------------------------------------------------------------------


def conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip


def score_gradients(masks, x, **contexts):
    """Of a loss with penalty over two micro-batches, backward inside the contexts of these MaskSet methods."""
    for scores in masks.scores().values():
        scores.grad = None
    for part in x.chunk(2):
        with masks.collect_penalty() as penalty:
            loss = masks.model(part).pow(2).mean()
        with contextlib.ExitStack() as stack:
            for name in contexts:
                stack.enter_context(getattr(masks, name)())
            (loss + 0.1 * penalty()).backward()
    return [scores.grad for scores in masks.scores().values()]


@pytest.mark.parametrize("unit", ["weight", "row"])
def test_score_gradients_of_convolutions_made_at_once_are_those_made_one_by_one(unit, monkeypatch):
    masks, x = mask_model(conv_net(), unit=unit), torch.randn(6, 3, 6, 6)
    alone = score_gradients(masks, x)
    calls = []
    many = NativeBackend.grad_scores_of_many

    def counted(self, grads, *rest):
        calls.append(len(grads))
        return many(self, grads, *rest)

    monkeypatch.setattr(NativeBackend, "grad_scores_of_many", counted)
    together = score_gradients(masks, x, batch_score_gradients=True)
    assert calls == ([2, 2] if native.is_available() else [])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    with masks.batch_score_gradients(), pytest.raises(RuntimeError, match="entered twice"):
        masks.batch_score_gradients().__enter__()
    with pytest.raises(ZeroDivisionError), masks.batch_score_gradients():
        masks.model(x).sum().backward()
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(alone, score_gradients(masks, x), strict=True))


def test_score_gradients_made_at_once_reach_the_scores_under_checkpointing_and_when_saved_elsewhere():
    masks, x = mask_model(conv_net()), torch.randn(6, 3, 6, 6)

    def gradients(is_batched, forward):
        for scores in masks.scores().values():
            scores.grad = None
        loss = forward()
        with masks.batch_score_gradients() if is_batched else contextlib.nullcontext():
            loss.backward()
        return [scores.grad for scores in masks.scores().values()]

    def saved_elsewhere():
        with torch.autograd.graph.save_on_cpu():
            return masks.model(x).pow(2).sum()

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(masks.model, x, use_reentrant=False).pow(2).sum()

    for forward in (saved_elsewhere, checkpointed):
        for a, b in zip(gradients(False, forward), gradients(True, forward), strict=True):
            assert torch.equal(a, b)


def test_without_kept_effective_weights_nothing_of_a_weights_size_is_saved_and_the_gradients_are_the_same():
    x = torch.randn(6, 3, 6, 6)
    kept = mask_model(conv_net())
    lean = mask_model(conv_net(), keep_effective_weights=False)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        lean.model(x)
    own = {p.data_ptr() for p in lean.model.parameters()}
    sizes = {p.shape for p in lean.model.parameters() if p.dim() > 1}
    assert not [t for t in saved if t.shape in sizes and t.data_ptr() not in own]
    for a, b in zip(score_gradients(kept, x), score_gradients(lean, x), strict=True):
        assert (a - b).abs().max() <= 8 * EPS32 * a.abs().max()
    lean.refresh()
    assert all(layer._slot.w_eff is None for layer in lean.layers.values())
    compiled = torch.compile(lean.model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), kept.model(x), atol=1e-6)


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_device", [False, True])
def test_a_masked_mlp_compiles_in_one_graph_and_100_values_of_beta_compile_nothing_again(on_device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = mlp()
    masks = mask_model(model, init=random_scores)
    masks.anneal(to=200, steps=100, on_device=on_device)
    optimizer = masks.adamw(lr=1e-2, lam=torch.tensor(1e-4) if on_device else 1e-4, capturable=on_device)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    betas = set()
    for step in range(100):
        betas.add(masks.beta)
        expected = torch.autograd.grad(model(inputs(step)).pow(2).mean(), list(masks.scores().values()))
        loss = compiled(inputs(step)).pow(2).mean()
        loss.backward()
        for scores, grad in zip(masks.scores().values(), expected, strict=True):
            assert (scores.grad - grad).abs().max() <= 8 * EPS32 * grad.abs().max()
        optimizer.step()
        optimizer.zero_grad()
    assert masks.beta == 200.0 and len(betas) == 100
    assert counter.frame_count == 1


def test_a_whole_compiled_step_with_the_schedule_on_the_device_compiles_nothing_again_after_its_first_run():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results, counts = [], []
    for is_compiled in (False, True):
        model = mlp()
        masks = mask_model(model, init=random_scores)
        masks.anneal(to=200, steps=30, on_device=True)
        optimizer = masks.adamw(lr=1e-2, lam=torch.tensor(1e-4), capturable=True)

        def step(x, model=model, optimizer=optimizer):
            model(x).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend=counter) if is_compiled else step
        for number in range(30):
            run(inputs(number))
            counts.append(counter.frame_count)
        assert masks.beta == 200.0
        results.append([scores.detach() for scores in masks.scores().values()])
    assert len(set(counts[30:])) == 1 and counts[-1] > 0
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_inside_collect_penalty_gives_the_same_penalty_and_gradients_in_one_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for is_compiled in (False, True):
        model = mlp()
        masks = mask_model(model, init=random_scores)
        run = torch.compile(model, fullgraph=True, backend=counter) if is_compiled else model
        for beta in (1.0, 5.0):
            masks.beta = beta
            with masks.collect_penalty() as penalty:
                loss = run(inputs()).pow(2).mean()
            (loss + 0.1 * penalty()).backward()
        results.append([scores.grad for scores in masks.scores().values()])
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).abs().max() <= 8 * EPS32 * eager.abs().max()
    assert counter.frame_count == 1


# --- slips that used to be silent ------------------------------------------------------------------------------------


def test_a_step_under_hard_masks_is_refused_and_moves_nothing():
    model = mlp()
    masks = mask_model(model)
    optimizer = masks.adamw(lr=0.1, lam=1e-2)
    before = {name: scores.detach().clone() for name, scores in masks.scores().items()}
    with masks.hard(), pytest.raises(RuntimeError, match=r"the masks are hard and .*call soften\(\) first"):
        optimizer.step()
    assert all(torch.equal(scores, before[name]) for name, scores in masks.scores().items())
    optimizer.step()
    assert not torch.equal(next(iter(masks.scores().values())), before[next(iter(before))])


def test_a_subnet_of_undecided_masks_comes_with_a_warning_and_says_so():
    masks = mask_model(mlp())
    with pytest.warns(UserWarning, match="100% of the masks are undecided at beta 1 .*anneal"):
        assert masks.subnet().provenance["undecided"] == 1.0
    masks.beta = 200.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert masks.subnet().provenance["undecided"] == 0.0
        masks.beta = 1.0
        masks.harden()
        masks.subnet()


def test_what_matches_nothing_is_answered_with_what_there_is():
    for targets in (["nope"], {"nope": {}}, "nope"):
        with pytest.raises(ValueError, match=r"match nothing.*what could be masked: 0 \(Linear\), 2 \(Linear\)"):
            mask_model(mlp(), targets)


def test_a_setting_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match=r"^mask_model: 0: MaskedLinear: unit must be 'weight'"):
        mask_model(mlp(), unit="rows")


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="the model is wrapped in nn.DataParallel"):
        mask_model(nn.DataParallel(mlp()))
