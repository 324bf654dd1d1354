"""Masks over parameters that no fused layer covers: every layer people have, raw parameters, ties, bypasses."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from subnets import DiscoveryConfig, Subnet, discover, mask_model, masks_of
from subnets.nn import MaskedLinear, MaskedParameter
from torch import Tensor, nn
from torch.autograd import forward_ad


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_scores(name: str, weight: Tensor) -> Tensor:
    return normal(*weight.shape, seed=weight.numel())


class Halved(nn.Linear):
    """A subclass of nn.Linear that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Attention(nn.Module):
    """Raw parameters as TransformerLens has them: W_Q [heads, d_model, d_head] ..."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("W_Q", "W_K", "W_V"):
            setattr(self, name, nn.Parameter(normal(2, 6, 3, seed=ord(name[2]))))
        self.W_O = nn.Parameter(normal(2, 3, 6, seed=5))
        self.b_Q = nn.Parameter(normal(2, 3, seed=6))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bpm,hmd->bhpd", x, w) for w in (self.W_Q, self.W_K, self.W_V))
        z = F.scaled_dot_product_attention(q + self.b_Q[:, None], k, v)
        return torch.einsum("bhpd,hdm->bpm", z, self.W_O)


class Lookup(nn.Module):
    """Bags of rows of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum")

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def attended(module: nn.Module) -> nn.Module:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    return Self()


IDS = torch.tensor([[1, 2, 6], [0, 3, 3]])
EVERY = ["0"]
CASES = {  # name: (new module, its input, targets, masked parameters)
    "embedding": (lambda: nn.Sequential(nn.Embedding(7, 4)), IDS, "all-embedding", ["0.weight"]),
    "embedding bag": (Lookup, IDS, "all-embedding", ["bag.weight"]),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1)), normal(2, 3, 9), None, ["0.weight"]),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2)), normal(2, 2, 4, 4, 4), None, ["0.weight"]),
    "conv transpose": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), normal(2, 3, 5, 5), None, ["0.weight"]),
    "subclass": (lambda: nn.Sequential(Halved(5, 3)), normal(4, 5), None, ["0.weight"]),
    "norm": (lambda: nn.Sequential(nn.LayerNorm(5)), normal(4, 5), EVERY, ["0.weight"]),
    "bias": (lambda: nn.Sequential(nn.Linear(5, 8)), normal(4, 5), ["0.bias"], ["0.bias"]),
    "raw": (Attention, normal(2, 4, 6), ["W_Q", "W_K", "W_V", "W_O"], ["W_K", "W_O", "W_Q", "W_V"]),
    "raw by regex": (lambda: nn.Sequential(Attention()), normal(2, 4, 6), r".*\.W_[QK]", ["0.W_K", "0.W_Q"]),
    "raw by type": (lambda: nn.Sequential(Attention()), normal(2, 4, 6), Attention,
                    ["0.W_K", "0.W_O", "0.W_Q", "0.W_V", "0.b_Q"]),
    "attention": (lambda: attended(nn.MultiheadAttention(6, 2, batch_first=True)), normal(2, 4, 6), None,
                  ["attention.in_proj_weight", "attention.out_proj.weight"]),
    "attention of other sizes": (lambda: attended(nn.MultiheadAttention(6, 2, kdim=6, vdim=6, batch_first=True)),
                                 normal(2, 4, 6), [nn.MultiheadAttention],
                                 ["attention.in_proj_weight", "attention.out_proj.weight"]),
    "encoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)),
                normal(2, 4, 6), None,
                ["0.linear1.weight", "0.linear2.weight", "0.self_attn.in_proj_weight", "0.self_attn.out_proj.weight"]),
    "recurrent": (Recurrent, normal(2, 5, 4), nn.LSTM, ["lstm.weight_hh_l0", "lstm.weight_ih_l0"]),
    "unfused": (lambda: nn.Sequential(nn.Linear(5, 3)), normal(4, 5), {"0": {"fused": False}}, ["0.weight"]),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def made(case: str) -> tuple[nn.Module, Tensor, object, list[str]]:
    new, x, targets, names = CASES[case]
    torch.manual_seed(0)
    return new().eval(), x, targets, names


@each_case
def test_a_masked_parameter_computes_what_the_multiplied_one_computes(case):
    model, x, targets, names = made(case)
    plain = copy.deepcopy(model).requires_grad_(False)
    base = plain(x)
    masks = mask_model(model, targets, init=random_scores)
    assert sorted(masks.layers) == names
    assert set(dict(model.named_parameters())) - set(masks.scores()) == set(dict(plain.named_parameters()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(masks.scores())
    with masks.disabled():
        assert torch.equal(model(x), base)
    hard = copy.deepcopy(plain)
    with torch.no_grad():
        for name, mask in masks.kept().items():
            assert 0 < mask.sum() < mask.numel()
            hard.get_parameter(name).mul_(mask)
    with masks.hard(), torch.no_grad():  # eval mode without grad: where nn.TransformerEncoderLayer has its fast path
        assert torch.equal(model(x), hard(x))
    assert all(row["has_effect"] for row in masks.audit(x))
    masks.unmask()
    assert torch.equal(model.requires_grad_(False)(x), base)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


@each_case
def test_gradients_of_scores_and_penalty_equal_those_of_the_formula(case):
    model, x, targets, _ = made(case)
    plain = copy.deepcopy(model).requires_grad_(False)
    masks = mask_model(model, targets, init=random_scores)
    masks.beta = 2.0
    with masks.collect_penalty() as penalty:
        loss = model(x).pow(2).sum()
    (loss + 0.1 * penalty()).backward()
    leaves = {name: layer.scores.detach().clone().requires_grad_() for name, layer in masks.layers.items()}
    replaced = {name: plain.get_parameter(name) * torch.sigmoid(2.0 * leaf) for name, leaf in leaves.items()}
    expected = torch.func.functional_call(plain, replaced, (x,)).pow(2).sum()
    (expected + 0.1 * sum(torch.sigmoid(2.0 * leaf).sum() for leaf in leaves.values())).backward()
    torch.testing.assert_close(loss, expected)
    for name, leaf in leaves.items():
        error = (masks.layers[name].scores.grad - leaf.grad).abs().max()
        assert error <= 2e-5 * leaf.grad.abs().max(), name


@pytest.mark.parametrize("case", ["embedding", "raw", "encoder", "recurrent"])
def test_copies_and_pickles_are_whole_and_apart(case):
    model, x, targets, _ = made(case)
    masks = mask_model(model, targets, init=random_scores)
    model(x).sum()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), model(x))
        others = masks_of(twin)
        assert list(others.layers) == list(masks.layers)
        others.adamw(lr=0.5, weight_decay=0.0, lam=1.0)
        twin(x).pow(2).sum().backward()
        others.adamw(lr=0.5).step()
        assert not torch.equal(twin(x), model(x))
        assert all(p.grad is None for p in model.parameters())
        others.unmask()
        assert not any(isinstance(m, MaskedParameter) for m in twin.modules())


def test_state_dict_keeps_the_bases_keys_and_comes_back():
    model, x, targets, _ = made("raw")
    keys = list(model.state_dict())
    masks = mask_model(model, targets, init=random_scores)
    state = model.state_dict()
    assert [key for key in state if not key.endswith("_mask.scores")] == keys
    other, *_ = made("raw")
    mask_model(other, targets)
    other.load_state_dict(state)
    assert torch.equal(other(x), model(x))
    state["W_Q"][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="W_Q has NaN"):
        other.load_state_dict(state)
    assert masks.subnet().masks["W_Q"].shape == (2, 6, 3)


def test_scores_follow_device_and_width_of_the_weight_never_its_narrowness():
    model, x, targets, _ = made("raw")
    masks = mask_model(model, targets)
    scores = lambda: {layer.scores.dtype for layer in masks.layers.values()}  # noqa: E731
    model.bfloat16()
    assert scores() == {torch.float32} and model(x.bfloat16()).dtype == torch.bfloat16
    model.double()
    assert scores() == {torch.float64}
    model(x.double()).sum().backward()
    assert all(layer.scores.grad.dtype == torch.float64 for layer in masks.layers.values())


def test_what_is_kept_between_reads_without_grad_is_never_stale():
    model, x, targets, _ = made("embedding")
    masks = mask_model(model, targets, init=random_scores)
    layer = masks.layers["0.weight"]
    now = lambda: model[0].weight  # noqa: E731
    expected = lambda: layer.weight * torch.sigmoid(masks.beta * layer.scores)  # noqa: E731
    with torch.no_grad():
        first = now()
        assert now() is first  # kept
        masks.beta = 3.0
        torch.testing.assert_close(now(), expected())
        layer.scores.add_(0.5)
        torch.testing.assert_close(now(), expected())
    optimizer = masks.adamw(lr=0.1, lam=1e-3)
    model(x).pow(2).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(now(), expected())
    masks.check_fresh()
    assert now().requires_grad


def test_forward_mode_derivatives_are_refused_never_zero():
    model, x, targets, _ = made("embedding")
    scores = mask_model(model, targets).layers["0.weight"].scores.detach()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        dual = forward_ad.make_dual(scores, torch.ones_like(scores))
        torch.func.functional_call(model, {"0.weight_mask.scores": dual}, (x,))


def test_what_is_written_into_a_masked_weight_is_lost_and_not_kept():
    model, x, targets, _ = made("embedding")
    mask_model(model, targets, init=random_scores)
    expected = model(x).detach()
    with torch.no_grad():
        nn.init.zeros_(model[0].weight)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("case", ["embedding", "raw", "attention"])
def test_a_compiled_model_follows_beta_without_a_graph_break_or_a_new_graph(case):
    model, x, targets, _ = made(case)
    masks = mask_model(model, targets, init=random_scores)
    torch._dynamo.reset()
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=counting)
    for beta in (1.0, 2.0, 5.0):
        masks.beta = beta
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1


UNITS = [  # module, unit, scores' shape
    (lambda: nn.Embedding(6, 4), "row", (6, 1)),
    (lambda: nn.Embedding(6, 4), "column", (1, 4)),
    (lambda: nn.Conv1d(3, 4, 3), "row", (4, 1, 1)),
    (lambda: nn.ConvTranspose2d(3, 4, 3), "row", (1, 4, 1, 1)),
    (lambda: nn.ConvTranspose2d(3, 4, 3), "column", (3, 1, 1, 1)),
    (lambda: nn.ConvTranspose2d(3, 4, 3), "head:2", (1, 2, 1, 1)),
    (lambda: nn.Embedding(6, 4), (3, 2), (2, 2)),
]


@pytest.mark.parametrize("new, unit, shape", UNITS)
def test_units_name_roles(new, unit, shape):
    masks = mask_model(nn.Sequential(new()), [type(new())], unit=unit)
    assert masks.layers["0.weight"].scores.shape == shape


# --- ties ------------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.wte(ids))


@pytest.mark.parametrize("targets", [["wte"], ["head"], ["wte", "head"], "wte", r".*", nn.Embedding, [nn.Linear]])
def test_a_tied_weight_has_one_mask_for_all_its_places(targets):
    model = Tied()
    reference = copy.deepcopy(model)
    masks = mask_model(model, targets, init=random_scores)
    assert list(masks.layers) == ["wte.weight"] and list(masks.scores()) == ["wte.weight_mask.scores"]
    with torch.no_grad():
        reference.wte.weight.mul_(masks.kept()["wte.weight"])
    for one in (model, copy.deepcopy(model)):
        with masks_of(one).hard():
            assert torch.equal(one(IDS), reference(IDS))
    masks.unmask()
    assert model.head.weight is model.wte.weight and type(model.head) is nn.Linear


def test_two_parameters_in_the_same_memory_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are two Parameters in the same memory"):
        mask_model(model)
    assert list(mask_model(model, exclude="1").layers) == ["0.weight"]


@pytest.mark.parametrize("targets", ["all-linear", ["all-linear"], {"all-linear"}, {"all-linear": {}}, None])
def test_tied_weights_are_left_out_where_nobody_names_them(targets):
    model = nn.Sequential(Tied(), nn.Linear(7, 2))
    assert list(mask_model(model, targets).layers) == ["1.weight"]


def test_a_tied_weight_has_the_options_of_the_first_pattern_that_names_one_of_its_places():
    masks = mask_model(Tied(), {"head": {"unit": "column"}, "wte": {"unit": "row"}})
    assert masks.layers["wte.weight"].unit == "column"


@pytest.mark.parametrize("exclude", ["0", ["0"], [nn.Linear], nn.Linear])
def test_an_excluded_module_keeps_its_bias_unmasked_too(exclude):
    model = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))
    assert list(mask_model(model, ["bias"], exclude=exclude).layers) == ["1.bias"]


# --- options by pattern ----------------------------------------------------------------------------------------------


def test_a_dict_of_targets_gives_each_pattern_options_of_its_own():
    linear = {"q": nn.Linear(4, 6), "up": nn.Linear(4, 8), "no": nn.Linear(2, 2)}
    model = nn.ModuleDict({**linear, "emb": nn.Embedding(5, 4)})
    masks = mask_model(model, {
        "q": {"unit": "head:3", "score_init": 0.5}, r"(q|up)": {"unit": "column"}, "all-embedding": {},
    }, unit="row")  # fmt: skip
    found = {name: (layer.unit, layer.scores.flatten()[0].item()) for name, layer in masks.layers.items()}
    assert found == {
        "q.weight": ("head:3", 0.5), "up.weight": ("column", pytest.approx(-0.1)),
        "emb.weight": ("row", pytest.approx(-0.1)),
    }  # fmt: skip


@pytest.mark.parametrize("targets, error, message", [
    ({"0": {"units": "row"}}, TypeError, "must be a dict of kind, unit, score_init, fused, got {'units'"),
    ({"0": "row"}, TypeError, "must be a dict of kind"),
    ({"1": {}}, ValueError, "targets '1' match nothing"),
    ({("0",): {}}, TypeError, "a key of targets must be a regex"),
    ({"0": {"kind": "hard"}}, ValueError, "mask_model: 0: kind 'hard' trains no scores"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(targets, error, message):
    with pytest.raises(error, match=message):
        mask_model(nn.Sequential(nn.Linear(3, 3)), targets)


# --- what can't be masked --------------------------------------------------------------------------------------------


class OwnContainer(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 3))
        self.scale = nn.Parameter(torch.ones(3, 3))


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("W_mask", torch.ones(3, 3))


@pytest.mark.parametrize("new, targets, message", [
    (lambda: nn.Sequential(nn.Embedding(4, 3, max_norm=1.0)), ["0"], "0: an Embedding with max_norm rescales"),
    (lambda: nn.Sequential(nn.Embedding(4, 3, sparse=True)), ["0"], "0: an Embedding with sparse=True makes sparse"),
    (Taken, ["W"], "the model: it has a W_mask already"),
    (OwnContainer, ["scale"], "the model: a OwnContainer's own parameters can't be masked"),
    (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))), None, "0: its weight is not a"),
    (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=2)), {"0": {"unit": "row"}}, "transposed .* groups"),
])  # fmt: skip
def test_modules_that_can_not_take_a_mask_say_why_and_stay(new, targets, message):
    model = new()
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        mask_model(model, targets)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == keys


# --- bypasses --------------------------------------------------------------------------------------------------------


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """Reads a weight where no class says so."""
    return F.linear(x, layer.weight)


class Fused(nn.Module):
    """Hands the head to somebody who reads its weight, as fused losses do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return product(self.body(x), self.head)


class InEvalOnly(Fused):
    """... in one mode alone."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        return self.head(hidden) if self.training else product(hidden, self.head)


class AlsoRead(Fused):
    """... beside calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + 1e-3 * product(torch.ones(4), self.head)


@pytest.mark.parametrize("new", [Fused, InEvalOnly, AlsoRead])
def test_audit_names_a_bypassed_layer_and_unfused_masks_are_not_bypassed(new):
    model = new().train()
    masks = mask_model(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"bypassed: head\.weight is read without the mask.*fused=False"):
        masks.audit(normal(5, 4))
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    masks.unmask()
    masks = mask_model(model, {"head": {"fused": False}, "all-linear": {}})
    assert isinstance(model.body, MaskedLinear) and not isinstance(model.head, MaskedLinear)
    assert all(row["has_effect"] for row in masks.audit(normal(5, 4)))


class Reading(Fused):
    """Says in its code which weight it reads, as most do, and asks another for its type alone."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.body.weight, Tensor) and x.dtype == self.body.weight.dtype
        return self.read(self.body(x))

    @torch.autocast("cpu", enabled=False)
    def read(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.head.weight.contiguous(), self.head.bias)


def test_weights_that_the_code_of_a_class_reads_are_masked_where_they_are_read():
    class Derived(Reading):
        pass

    model, x = nn.Sequential(Derived()), normal(5, 4)
    plain = copy.deepcopy(model)
    masks = mask_model(model, init=random_scores)
    assert isinstance(model[0].body, MaskedLinear) and not isinstance(model[0].head, MaskedLinear)
    with torch.no_grad():
        for name, mask in masks.kept().items():
            plain.get_parameter(name).mul_(mask)
    with masks.hard():
        torch.testing.assert_close(model(x), plain(x))
    assert all(row["has_effect"] for row in masks.audit(x))


def test_mamba_and_mobilebert_read_weights_of_linear_layers_and_are_not_bypassed():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    mamba = transformers.MambaConfig(vocab_size=19, hidden_size=8, state_size=4, num_hidden_layers=1)
    bert = transformers.MobileBertConfig(
        vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        embedding_size=4, true_hidden_size=4, intra_bottleneck_size=4,
    )  # fmt: skip
    for model in (transformers.MambaForCausalLM(mamba), transformers.MobileBertForMaskedLM(bert)):
        rows = mask_model(model.eval()).audit(torch.tensor([[1, 5, 7, 2]]))
        assert rows and all(row["runs"] for row in rows)


def test_an_output_head_is_masked_wherever_it_is_read():
    model = Fused()
    model.get_output_embeddings = lambda: model.head
    masks = mask_model(model, ["head"], init=random_scores)
    x = normal(5, 4)
    with masks.hard():
        expected = F.linear(model.body(x), masks.layers["head.weight"].weight * masks.kept()["head.weight"])
        assert torch.equal(model(x), expected)
    masks.audit(x)


def test_audit_refuses_other_parameters_that_train_and_puts_everything_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    masks = mask_model(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert all(row["has_effect"] for row in masks.audit(normal(5, 4)))
    assert torch.equal(torch.rand(1), expected) and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model[1].requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"only scores should train, but 1\.weight, 1\.bias require grad"):
        masks.audit(normal(5, 4))


class Untold(Fused):
    """Of whose output nothing can be told, in one way or another."""

    def __init__(self, end: object) -> None:
        super().__init__()
        self.end = end

    def forward(self, x: Tensor) -> object:
        return self.end(super().forward(x))  # type: ignore[operator]


@pytest.mark.parametrize("end, message", [
    (lambda out: out.argmax(-1), "no finite floating-point tensor"),
    (lambda out: {"logits": out * torch.inf - torch.inf}, "no finite floating-point tensor"),
    (lambda out: type("Output", (), {"logits": out})(), "no finite floating-point tensor"),
    (lambda out: out * random.random(), "two runs on the same inputs and torch seed differ"),
])  # fmt: skip
def test_audit_refuses_where_it_can_tell_nothing(end, message):
    with pytest.raises(RuntimeError, match=message):
        mask_model(Untold(end)).audit(normal(5, 4))


def test_audit_refuses_inside_blocks_that_change_what_layers_do():
    masks = mask_model(nn.Sequential(nn.Linear(4, 3)))
    with masks.disabled(), pytest.raises(RuntimeError, match="inside disabled"):
        masks.audit(normal(5, 4))


class Counting(nn.Linear):
    """Puts a new buffer in the old one's place at each pass."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes = self.passes + 1
        return super().forward(x)


def test_audit_puts_buffers_back_that_were_replaced():
    model = nn.Sequential(Counting())
    mask_model(model).audit(normal(5, 4))
    assert model[0].passes.item() == 0


# --- what is built on masks ------------------------------------------------------------------------------------------


def test_discovery_finds_the_rows_of_an_embedding_that_a_task_needs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(4, 1))
    ids = torch.tensor([[0], [1], [2], [3]])
    target = model(ids).detach()
    config = DiscoveryConfig(
        epochs=30, steps_per_epoch=10, lr=0.05, lam=1e-3, score_init=0.1, targets="all-embedding", unit="row"
    )
    found = discover(model, [ids] * 10, lambda m, batch: (m(batch) - target).pow(2).sum(), config)
    rows = found.subnet.masks["0.weight"][:, 0]
    assert rows.tolist() == [True] * 4 + [False] * 4
    assert type(model[0]) is nn.Embedding


def test_many_discoveries_at_once_find_what_each_finds_alone():
    model, x = Attention(), normal(3, 4, 6)
    target = model(x).detach() * 0.5
    settings = dict(epochs=2, steps_per_epoch=5, lr=0.05, score_init=0.01, targets=["W_Q", "W_O"])

    def objective(m: nn.Module, batch: Tensor) -> Tensor:
        return (m(batch) - target).pow(2).sum()

    lams = (1e-3, 1e-1)
    alone = [discover(model, [x] * 5, objective, DiscoveryConfig(lam=lam, **settings)).subnet for lam in lams]
    together = discover(model, [x] * 5, objective, DiscoveryConfig(penalties=lams, **settings))
    assert alone[0].iou(alone[1]) < 1
    for run, one in zip(together, alone, strict=True):
        assert run.subnet.iou(one) == 1.0 and set(one.masks) == {"W_Q", "W_O"}


def test_a_subnet_of_raw_parameters_applies_to_the_unmasked_model(tmp_path):
    model, x, targets, _ = made("raw")
    masks = mask_model(model, targets, init=random_scores)
    with masks.hard(), torch.no_grad():
        expected = model(x)
    subnet = masks.subnet(task="raw")
    masks.unmask()
    subnet.save(tmp_path / "raw.safetensors", weights=model)
    with Subnet.load(tmp_path / "raw.safetensors").applied(model), torch.no_grad():
        assert torch.equal(model(x), expected)
