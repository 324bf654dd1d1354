"""What needs a GPU: the CUDA kernels, layers, masks and anchors that follow their model there, and captured steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import subnet_kernels as sk
from benchmarks import gpu_correctness, gpu_cuda, gpu_masks
from subnet_kernels.backends import cuda_gemm, native
from subnet_kernels.dispatch import BACKENDS as BACKENDS_BY_NAME
from subnet_kernels.testing import conv_case, linear_case, ours, worst_errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU here")]
needs_cuda_kernels = pytest.mark.skipif(not native.has_cuda_kernels(), reason="the extension has no CUDA kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_cuda_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_effective_weights_of_odd_sizes_are_within_the_error_bound_and_repeat_bit_for_bit(dtype):
    torch.manual_seed(0)
    shapes = [(1, 1), (3, 5), (127, 129), (64, 3, 3, 3), (0, 4), (1024, 1023)]
    weights = [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]
    scores = [torch.randn(shape, device="cuda") for shape in shapes]
    with sk.use_backend("cuda"):
        first, penalty = sk.effective_weights(weights, scores, 3.0)
        second, penalty_again = sk.effective_weights(weights, scores, 3.0)
    assert torch.equal(penalty, penalty_again)
    exact = [w.double() * torch.sigmoid(3 * s.double()) for w, s in zip(weights, scores, strict=True)]
    u = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    for a, b, true in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        assert ((a.double() - true).abs() <= 1.001 * u * true.abs() + 6e-8).all()
    total = sum(torch.sigmoid(3 * s.double()).sum().item() for s in scores)
    assert penalty.item() == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("name", ["triton", pytest.param("cuda", marks=needs_cuda_kernels)])
def test_steps_and_score_gradients_of_many_tensors_are_within_their_bounds_and_repeat_bit_for_bit(name):
    checks = [*gpu_cuda.grad_scores_checks("cuda", 0, BACKENDS_BY_NAME[name])]
    checks += gpu_cuda.step_checks("cuda", 0, BACKENDS_BY_NAME[name])
    assert {what: ratio for what, ratio in checks if not ratio <= 1} == {}


@pytest.mark.parametrize("name", ["triton", pytest.param("cuda", marks=needs_cuda_kernels)])
def test_several_masks_over_one_weight_are_right_and_to_the_bit_those_of_one_call_a_mask(name):
    backend = BACKENDS_BY_NAME[name]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        checks = list(gpu_masks.checks("cuda", 0, backend, (*gpu_masks.SHAPES, (257, 389))))
        if name == "triton":
            checks += gpu_masks.product_checks("cuda", 0, backend)
    assert {what: ratio for what, ratio in checks if not ratio <= 1} == {}


@needs_cuda_kernels
def test_packed_masks_and_random_bits_are_those_of_plain_pytorch():
    assert {what: ratio for what, ratio in gpu_cuda.bit_checks("cuda", 0) if not ratio <= 1} == {}


@needs_cuda_kernels
def test_a_replayed_graph_draws_by_the_seed_and_offset_of_now():
    seed, offset = torch.tensor(5, device="cuda"), torch.tensor(0, device="cuda")
    sk.random_bits(seed, offset, (67, 129))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sk.random_bits(seed, offset, (67, 129))
        offset += 1
    for i in range(3):
        graph.replay()
        assert torch.equal(drawn.cpu().to(torch.int32), sk.random_bits(5, i, (67, 129)).to(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_conv_on_the_gpu_are_within_the_error_bound(dtype):
    for case in (
        linear_case(33, 65, 129, dtype, device="cuda"),
        linear_case(7, 24, 36, dtype, scores_shape=(24, 1), is_transposed=True, device="cuda"),
        conv_case((2, 4, 9, 7), (6, 2, 3, 3), dtype, groups=2, padding=1, device="cuda"),
    ):
        worst = worst_errors(case, ours)
        assert max(worst.values()) <= 1, worst


def test_scores_beta_and_planted_weights_follow_the_model_and_hold_there():
    from subnets import mask_model, transfer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    masks = mask_model(model)
    model.cuda()
    assert model[0].scores.is_cuda and model[0].beta.is_cuda
    optimizer = masks.adamw(lr=0.1, lam=1e-3)
    masks.anneal(to=100, steps=10)
    for _ in range(10):
        model(torch.randn(8, 16, device="cuda")).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.check_fresh()
    assert masks.beta == pytest.approx(100)
    subnet = masks.subnet()
    masks.unmask()
    fresh = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).cuda()
    transfer(subnet, model, fresh)
    optimizer = torch.optim.AdamW(fresh.parameters(), 0.1, fused=True)
    for _ in range(5):
        fresh(torch.randn(8, 16, device="cuda")).pow(2).mean().backward()
        optimizer.step()
    kept = subnet.masks["0.weight"].cuda()
    assert torch.equal(fresh[0].weight[kept], model[0].weight[kept])


# --- steps captured as CUDA graphs -----------------------------------------------------------------------------------

BACKENDS = ["triton", pytest.param("cuda", marks=needs_cuda_kernels), "reference"]


class Training:
    """A masked network whose step is forward, backward, MaskAdamW and schedule, in one of several forms; eager unless
    ``run`` is replaced."""

    def __init__(self, form: str = "plain") -> None:
        from subnets import mask_model

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4)).cuda()
        self.masks = mask_model(self.model)
        self.lam = torch.tensor(1e-3, device="cuda")
        self.optimizer = self.masks.adamw(lr=0.02, lam=self.lam, capturable=True)
        self.masks.anneal(to=100, steps=15, every=2, on_device=True)
        self.x = torch.zeros(8, 16, device="cuda")
        self.form, self.forward = form, self.model
        if form == "compiled":
            self.model(self.x)  # buffers for the graph
            self.forward = torch.compile(self.model, backend="aot_eager")
        self.run = self.step

    def step(self) -> torch.Tensor:
        if self.form == "micro-batches":
            self.masks.refresh()
            halves = [self.forward(half).square().mean() / 2 for half in self.x.chunk(2)]
            for half in halves:
                half.backward()
            loss = halves[0] + halves[1]
        elif self.form == "collected":
            with self.masks.collect_penalty() as penalty:
                loss = self.forward(self.x).square().mean()
            (loss + 1e-3 * penalty()).backward()
        else:
            loss = self.forward(self.x).square().mean()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def train(self, num_steps: int = 20) -> list[torch.Tensor]:
        torch.manual_seed(1)
        generator = torch.Generator("cuda").manual_seed(2)
        losses = []
        for number in range(num_steps):
            self.x.copy_(torch.randn(8, 16, device="cuda", generator=generator))
            self.lam.fill_(1e-3 * (1 + number))
            losses.append(self.run().detach().clone())
        return losses

    def expected(self) -> torch.Tensor:
        """The network's output (without dropout) by the one line of PyTorch."""
        x = self.x
        for layer in (self.model[0], self.model[3]):
            w_eff = layer.weight * torch.sigmoid(layer.beta * layer.scores)
            x = nn.functional.linear(x if layer is self.model[0] else x.relu(), w_eff, layer.bias)
        return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["plain", "micro-batches", "collected", "compiled"])
def test_a_captured_step_replayed_20_times_gives_the_numbers_of_the_eager_one(form, backend):
    from subnets import CapturedStep

    with sk.use_backend(backend):
        eager, captured = Training(form), Training(form)
        captured.run = CapturedStep(captured.masks, captured.step, captured.optimizer)
        assert captured.masks.beta == 1.0 and (captured.model[0].scores == torch.tensor(-0.1)).all()
        losses = [torch.stack(training.train()) for training in (eager, captured)]
        assert torch.allclose(*losses, rtol=1e-4, atol=1e-6)
        assert captured.masks.beta == eager.masks.beta == 100
        for replayed, wanted in zip(captured.masks.scores().values(), eager.masks.scores().values(), strict=True):
            assert (wanted + 0.1).abs().max() > 0.1  # it did train
            assert torch.allclose(replayed, wanted, rtol=0, atol=1e-4)
        for _ in range(2):  # an eager pass sees the scores of the last replay, whenever it comes
            captured.model.eval()
            assert torch.allclose(captured.model(captured.x), captured.expected(), rtol=1e-4, atol=1e-5)
            captured.masks.check_fresh()
            captured.model.train()
            captured.run()
        states = [captured.optimizer.state[s]["step"].item() for s in captured.masks.scores().values()]
        assert states == [22.0, 22.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_step_of_convolutions_made_at_once_gives_the_numbers_of_the_eager_one(backend):
    from subnets import CapturedStep, mask_model

    def trained(is_captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)).cuda()
        model = model.to(memory_format=torch.channels_last)
        masks = mask_model(model)
        optimizer = masks.adamw(lr=0.02, lam=1e-3, capturable=True)
        masks.anneal(to=50, steps=8, on_device=True)
        x = torch.zeros(4, 3, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last)

        def step() -> None:
            masks.refresh()
            loss = model(x).square().mean()
            with masks.batch_score_gradients():
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run = CapturedStep(masks, step, optimizer) if is_captured else step
        generator = torch.Generator("cuda").manual_seed(2)
        for _ in range(8):
            x.copy_(torch.randn(x.shape, device="cuda", generator=generator))
            run()
        assert masks.beta == pytest.approx(50)
        return [scores.detach() for scores in masks.scores().values()]

    flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with sk.use_backend(backend), flags:
        for eager, captured in zip(trained(False), trained(True), strict=True):
            assert (eager + 0.1).abs().max() > 0.05
            assert torch.allclose(eager, captured, rtol=0, atol=1e-4)


def test_eager_steps_between_replays_continue_the_same_training():
    from subnets import CapturedStep

    eager, mixed = Training(), Training()
    replay = CapturedStep(mixed.masks, mixed.step, mixed.optimizer)
    turns = iter([replay, mixed.step, mixed.step, replay] * 5)
    mixed.run = lambda: next(turns)()
    losses = [torch.stack(training.train()) for training in (eager, mixed)]
    assert torch.allclose(*losses, rtol=1e-4, atol=1e-6)
    for replayed, wanted in zip(mixed.masks.scores().values(), eager.masks.scores().values(), strict=True):
        assert torch.allclose(replayed, wanted, rtol=0, atol=1e-4)


def test_a_step_that_waits_for_the_device_is_refused_in_words_and_the_training_goes_on_eagerly():
    from subnets import CapturedStep

    training = Training()
    with pytest.raises(RuntimeError, match="it must not wait for the device"):
        CapturedStep(training.masks, lambda: training.step() * training.x.sum().item(), training.optimizer)
    twin = Training()
    assert torch.allclose(torch.stack(training.train(5)), torch.stack(twin.train(5)), rtol=1e-4, atol=1e-6)


def test_a_graph_of_ones_own_refreshes_at_each_use_and_ends_trust_outside():
    training = Training()
    model, masks = training.model.eval(), training.masks
    training.x.normal_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(training.x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    training.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(training.x)
        out.square().mean().backward()
    for _ in range(4):
        graph.replay()
        assert torch.allclose(out, training.expected(), rtol=1e-4, atol=1e-5)
        expected = torch.autograd.grad(training.expected().square().mean(), list(masks.scores().values()))
        for scores, grad in zip(masks.scores().values(), expected, strict=True):
            assert torch.allclose(scores.grad, grad, rtol=1e-3, atol=1e-6)
        training.optimizer.step()
        assert torch.allclose(model(training.x), training.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("anneal", ["epoch", "step"])
def test_discover_with_a_cuda_graph_finds_what_it_finds_without(anneal, tmp_path):
    from subnets import DiscoveryConfig, discover

    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(70, 16, generator=generator), torch.randint(4, (70,), generator=generator)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 70, 16)]  # the last one is smaller

    def objective(model, batch):
        noisy = batch[0].cuda() * (1 + 0.1 * torch.randn(16, device="cuda"))
        return nn.functional.cross_entropy(model(noisy), batch[1].cuda())

    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).cuda()
        config = DiscoveryConfig(
            epochs=4, lr=0.05, lam=1e-3, anneal=anneal, cuda_graph=cuda_graph, checkpoint=tmp_path / str(cuda_graph)
        )
        found.append(discover(model, batches, objective, config, evaluate=lambda m: m(x.cuda()).sum().item()))
    for plain, replayed in zip(found[0].history, found[1].history, strict=True):
        assert replayed == pytest.approx(plain, rel=1e-3)
    same = [(found[0].subnet.masks[name] == mask).float().mean() for name, mask in found[1].subnet.masks.items()]
    assert min(same) > 0.99


def test_discovery_in_bulk_ends_as_each_member_alone_and_goes_on_from_its_checkpoint(tmp_path):
    from subnets import DiscoveryConfig, discover

    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(70, 16, generator=generator).cuda(), torch.randint(4, (70,), generator=generator).cuda()

    def batches(epoch):
        return ((x[part], y[part]) for part in torch.randperm(70).cuda().split(16))  # the last one is smaller

    def objective(model, batch):
        noisy = batch[0] * (1 + 0.1 * torch.randn(16, device="cuda"))
        return nn.functional.cross_entropy(model(noisy), batch[1])

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).cuda()

    def evaluate(model):
        return -nn.functional.cross_entropy(model(x), y).item()

    class Stop(Exception):
        pass

    def stop(row, masks):
        if row["epoch"] == 2 and row["seed"] == 1:
            raise Stop

    config = DiscoveryConfig(epochs=4, lr=0.05, seeds=(0, 1), penalties=(1e-4, 1e-2), checkpoint=tmp_path / "c")
    with pytest.raises(Stop):
        discover(network(), batches, objective, config, evaluate=evaluate, callbacks=[stop])
    found = discover(network(), batches, objective, config, evaluate=evaluate)
    assert len(found) == 4 and len(found.shared) == 2
    for run, member in zip(found, config.members(), strict=True):
        alone = discover(network(), batches, objective, member, evaluate=evaluate)
        for row, its in zip(run.history, alone.history, strict=True):
            assert row["loss"] == pytest.approx(its["loss"], rel=1e-3)
            assert row["density"] == pytest.approx(its["density"], abs=0.01)
        same = [(run.subnet.masks[name] == mask).float().mean() for name, mask in alone.subnet.masks.items()]
        assert min(same) > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_schedule_and_a_lam_on_the_device_advance_with_every_replay(backend):
    from subnets import mask_model

    masks = mask_model(nn.Linear(8, 8).cuda())
    scores = masks.scores()["scores"]
    masks.anneal(start=2.0, to=32.0, steps=4, on_device=True)
    lam = torch.tensor(0.5, device="cuda")
    optimizer = masks.adamw(lr=0.0, weight_decay=0.0, lam=lam, capturable=True)
    optimizer.step()
    masks.anneal(start=2.0, to=32.0, steps=4, on_device=True)
    scores.grad = torch.zeros_like(scores)
    graph = torch.cuda.CUDAGraph()
    with sk.use_backend(backend), torch.cuda.graph(graph):
        scores.grad.zero_()
        optimizer.step()
    for beta in (2.0, 4.0, 8.0, 16.0, 32.0, 32.0):
        assert masks.beta == beta
        graph.replay()
        m = torch.sigmoid(torch.tensor(beta * -0.1)).item()
        assert torch.allclose(scores.grad, torch.full_like(scores, lam.item() * beta * m * (1 - m)), rtol=1e-4)
        lam *= 0.5


@pytest.mark.skipif(not cuda_gemm.kernels(), reason="the extension was built without CUTLASS")
def test_cuda_products_match_fp64_repeat_to_the_bit_and_see_new_numbers_when_replayed():
    checks = dict(gpu_correctness.cuda_score_gradient_checks(seed=1))
    assert checks and max(checks.values()) <= 1, {name: ratio for name, ratio in checks.items() if not ratio <= 1}


@needs_cuda_kernels
def test_cuda_linear_layers_with_few_rows_match_fp64():
    checks = dict(gpu_correctness.cuda_few_rows_checks(seed=1))
    assert checks and max(checks.values()) <= 1, {name: ratio for name, ratio in checks.items() if not ratio <= 1}
