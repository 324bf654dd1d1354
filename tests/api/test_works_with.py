"""What people already use, on the four networks that they have: a table of networks by features.

Each cell compares numbers with the plain expression, ``W * sigmoid(beta*s)`` through functional_call, in fp64 and in
the cell's own dtype. docs/huggingface.md shows the same table.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from subnets import MaskSet, mask_model, masks_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.api.tiny_transformers import MODELS, made, random_scores

BETA = 2.0
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps its precision and device for the process: a Trainer with bf16 may have run before."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def batch_of(name: str, num: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels; a row is a sequence or an image."""
    torch.manual_seed(1)
    if name in ("gpt2", "bert"):
        ids = torch.randint(1, 19, (num, 7))
        labels = ids if name == "gpt2" else ids[:, 0] % 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels
    return {"pixel_values": torch.randn(num, 3, 8, 8)}, torch.arange(num) % 3


def plain_model(name: str) -> nn.Module:
    model, _ = made(name)
    if name != "resnet":  # of weights of .02 hardly anything depends on a mask
        for parameter in model.parameters():
            parameter.data.mul_(8)
    if name == "gpt2":
        model.config.use_cache = False  # what it returns is then tensors alone, as torch.export wants
    return model


def masked(name: str) -> MaskSet:
    masks = mask_model(plain_model(name), init=random_scores)
    masks.beta = BETA
    return masks


def loss_of(name: str, model: Callable[..., object], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Not the network's own loss: transformers' logger breaks GPT-2's graph there, masked or not."""
    logits = model(**inputs).logits.float()  # type: ignore[attr-defined]
    if name == "gpt2":
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels)


def gradients(masks: MaskSet, loss: Tensor, scale: float = 1.0) -> Gradients:
    """Of the scores, by weight; scores have no gradient after it."""
    (scale * loss).backward()
    found = {}
    for name, layer in masks.layers.items():
        assert layer.scores.grad.dtype == torch.float32
        found[name] = layer.scores.grad / scale
        layer.scores.grad = None
    return found


def plain_gradients(
    name: str, inputs: dict[str, Tensor], labels: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Gradients]:
    """Loss and gradients of the plain expression; the mask is taken in fp32, or in fp64 for the truth."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masks = masked(name)
    leaves = {n: la.scores.detach().to(wide).requires_grad_() for n, la in masks.layers.items()}
    model = masks.unmask().to(dtype)
    weights = {n: model.get_parameter(n).detach().to(wide) for n in leaves}
    w_eff = {n: (weights[n] * torch.sigmoid(BETA * s)).to(dtype) for n, s in leaves.items()}
    call = functools.partial(torch.func.functional_call, model, w_eff, ())
    loss = loss_of(name, lambda **batch: call(batch), cast(inputs, dtype), labels)
    grads = torch.autograd.grad(scale * loss, list(leaves.values()))
    return loss.detach(), {n: g / scale for n, g in zip(leaves, grads, strict=True)}


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@functools.cache
def truth(name: str) -> tuple[Tensor, Gradients]:
    inputs, labels = batch_of(name)
    return plain_gradients(name, inputs, labels, torch.float64)


def check(name: str, loss: Tensor, ours: Gradients, plain: tuple[Tensor, Gradients], dtype: torch.dtype) -> None:
    """Ours is as near to the truth as the plain expression in the same dtype is: DESIGN's bound for a backward pass,
    with a tensor's largest entry for its scale."""
    true_loss, true = truth(name)
    plain_loss, plain_grads = plain
    u = ROUNDOFF[dtype]
    assert abs(loss.double() - true_loss) <= 3 * abs(plain_loss.double() - true_loss) + 8 * u * true_loss
    assert set(ours) == set(true)
    for weight, exact in true.items():
        size = exact.abs().max()
        bound = 3 * (plain_grads[weight].double() - exact).abs().max() + 8 * u * size
        assert size > 0 and (ours[weight].double() - exact).abs().max() <= bound, weight


def eager(name: str) -> tuple[Tensor, Gradients]:
    masks = masked(name)
    loss = loss_of(name, masks.model, *batch_of(name))
    return loss.detach(), gradients(masks, loss)


def same(a: tuple[Tensor, Gradients], b: tuple[Tensor, Gradients]) -> bool:
    """To the bit."""
    return torch.equal(a[0], b[0]) and all(torch.equal(grad, b[1][name]) for name, grad in a[1].items())


# --- the features ----------------------------------------------------------------------------------------------------


def in_fp32(name: str) -> None:
    loss, ours = eager(name)
    check(name, loss, ours, plain_gradients(name, *batch_of(name), torch.float32), torch.float32)


def under_torch_compile(name: str) -> None:
    """One graph, and none again while beta anneals."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    masks, twin = masked(name), masked(name)
    compiled = torch.compile(masks.model, fullgraph=True, backend=counter)
    inputs, labels = batch_of(name)
    loss = loss_of(name, compiled, inputs, labels)
    plain = plain_gradients(name, inputs, labels, torch.float32)
    check(name, loss.detach(), gradients(masks, loss), plain, torch.float32)
    losses = []
    for run, trained in ((compiled, masks), (twin.model, twin)):
        optimizer = trained.adamw(lr=0.01, lam=1e-5, eps=1e-4)
        trained.anneal(to=200, steps=4)
        for _ in range(5):
            loss = loss_of(name, run, inputs, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert trained.beta == 200.0
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-5) and len(set(losses[:5])) == 5
    assert counter.frame_count == 1


def under_autocast(name: str, dtype: torch.dtype) -> None:
    """fp16 with the loss scaled, as a GradScaler does."""
    scale = 2.0**12 if dtype == torch.float16 else 1.0
    inputs, labels = batch_of(name)
    masks = masked(name)
    with torch.autocast("cpu", dtype):
        loss = loss_of(name, masks.model, inputs, labels)
        plain = plain_gradients(name, inputs, labels, torch.float32, scale)
    check(name, loss.detach(), gradients(masks, loss, scale), plain, dtype)


def in_bf16_weights(name: str) -> None:
    inputs, labels = batch_of(name)
    masks = masked(name)
    masks.model.to(torch.bfloat16)
    loss = loss_of(name, masks.model, cast(inputs, torch.bfloat16), labels)
    plain = plain_gradients(name, inputs, labels, torch.bfloat16)
    check(name, loss.detach(), gradients(masks, loss), plain, torch.bfloat16)
    before = {n: s.detach().clone() for n, s in masks.scores().items()}
    masks.model(**cast(inputs, torch.bfloat16)).logits.float().square().mean().backward()
    masks.adamw(lr=1e-4).step()  # far below what bf16 scores would notice
    assert all(bool((s != before[n]).any()) for n, s in masks.scores().items())
    masks.check_fresh()


def checkpoint_blocks(model: nn.Module, is_reentrant: bool) -> None:
    if model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
        return
    for stage in model.resnet.encoder.stages:  # transformers has none for ResNet
        stage.forward = functools.partial(torch.utils.checkpoint.checkpoint, stage.forward, use_reentrant=is_reentrant)


def with_checkpointing(name: str) -> None:
    """Gradients, the collected penalty's too, to the bit; a penalty that would get no gradient is refused."""
    inputs, labels = batch_of(name)
    results = []
    for is_checkpointed in (False, True):
        masks = masked(name)
        masks.model.train()
        if is_checkpointed:
            checkpoint_blocks(masks.model, is_reentrant=False)
        torch.manual_seed(2)  # dropout
        with masks.collect_penalty() as penalty:
            loss = loss_of(name, masks.model, inputs, labels)
        loss = loss + 1e-3 * penalty()
        results.append((loss.detach(), gradients(masks, loss)))
    assert same(*results)
    masks = masked(name)
    masks.model.train()
    checkpoint_blocks(masks.model, is_reentrant=True)
    with masks.collect_penalty(), pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss_of(name, masks.model, inputs, labels)


def with_accumulation(name: str) -> None:
    """Two halves of a batch are the batch, penalty and schedule counted once."""
    inputs, labels = batch_of(name)
    whole, halves = masked(name), masked(name)
    steps = []
    for masks, parts in ((whole, [slice(None)]), (halves, [slice(0, 2), slice(2, 4)])):
        masks.anneal(start=BETA, to=200, steps=2)
        optimizer = masks.adamw(lr=0.01, lam=1e-3)
        for part in parts:
            half = {key: value[part] for key, value in inputs.items()}
            (loss_of(name, masks.model, half, labels[part]) / len(parts)).backward()
        steps.append({n: s.grad.clone() for n, s in masks.scores().items()})
        optimizer.step()
        assert masks.beta == pytest.approx((BETA * 200) ** 0.5)
    for n, grad in steps[0].items():
        assert (grad - steps[1][n]).abs().max() <= 1e-5 * grad.abs().max()


def with_clipping(name: str) -> None:
    """The norm is that of the task's gradient; the penalty joins after the clipping, whole."""
    inputs, labels = batch_of(name)
    masks, lam = masked(name), 1e-3
    _, true = truth(name)
    norm = torch.stack([grad.norm() for grad in true.values()]).norm()
    optimizer = masks.adamw(lr=0.01, lam=lam)
    twins = [s.detach().double().requires_grad_() for s in masks.scores().values()]
    loss_of(name, masks.model, inputs, labels).backward()
    found = nn.utils.clip_grad_norm_(masks.model.parameters(), float(norm) / 10)
    assert float(found) == pytest.approx(float(norm), rel=1e-4)
    for twin, grad in zip(twins, true.values(), strict=True):
        m = torch.sigmoid(BETA * twin.detach())
        twin.grad = grad / 10 + lam * BETA * m * (1 - m)
    torch.optim.AdamW(twins, lr=0.01, eps=1e-3).step()
    optimizer.param_groups[0]["eps"] = 1e-3  # so that the step has the gradient's size, not its sign alone
    optimizer.step()
    for twin, scores in zip(twins, masks.scores().values(), strict=True):
        assert (twin - scores).abs().max() <= 1e-5


def deep_copied(name: str) -> None:
    _is_a_twin(name, copy.deepcopy)


def pickled(name: str) -> None:
    def through_a_file(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    _is_a_twin(name, through_a_file)


def _is_a_twin(name: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    """The copy has the bits, and trains alone."""
    masks = masked(name)
    loss_of(name, masks.model, *batch_of(name))  # so that effective weights are there
    twin = masks_of(copied(masks.model))
    loss = loss_of(name, twin.model, *batch_of(name))
    expected = eager(name)
    assert same((loss.detach(), gradients(twin, loss)), expected)
    twin.beta = 5.0
    optimizer = twin.adamw(lr=0.1)
    loss_of(name, twin.model, *batch_of(name)).backward()
    optimizer.step()
    loss = loss_of(name, masks.model, *batch_of(name))
    assert same((loss.detach(), gradients(masks, loss)), expected) and masks.beta == BETA


def averaged(name: str) -> None:
    """An average of scores; its masks are as hard as their average says, and never stale."""
    inputs, labels = batch_of(name)
    masks = masked(name)
    average = torch.optim.swa_utils.AveragedModel(masks.model)
    optimizer = masks.adamw(lr=0.5)
    seen = []
    for _ in range(3):
        loss_of(name, masks.model, inputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(masks.model)
        loss_of(name, average, inputs, labels)  # fills what the next update makes stale
        seen.append([s.detach().double() for s in masks.scores().values()])
    ours = masks_of(average)
    assert ours.beta == BETA and len({id(la.beta) for la in ours.layers.values()} - {id(masks._state.beta)}) == 1
    means = [torch.stack(history).mean(0) for history in zip(*seen, strict=True)]
    assert all((s - mean).abs().max() <= 1e-6 for s, mean in zip(ours.scores().values(), means, strict=True))
    ours.check_fresh()
    for parameter, base in zip(plain_model(name).parameters(), ours.unmask().parameters(), strict=True):
        assert torch.equal(parameter, base)


def exported(name: str) -> None:
    """What unmask(keep="masked") leaves is an ordinary network to torch.export."""
    inputs, _ = batch_of(name)
    masks = masked(name)
    with masks.hard(), torch.no_grad():
        expected = masks.model(**inputs).logits
    program = torch.export.export(masks.unmask(keep="masked"), (), inputs)
    assert torch.equal(program.module()(**inputs).logits, expected)
    assert not [node for node in program.graph.nodes if "subnet" in str(node.target)]


def with_accelerate(name: str) -> None:
    """Batches, accumulation and clipping by Accelerate, twice, are one's own loop."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs, labels = batch_of(name)
    rows = [({k: v[i] for k, v in inputs.items()}, labels[i]) for i in range(4)] * 2
    results = []
    for is_accelerated in (False, True):
        masks = masked(name)
        masks.anneal(start=BETA, to=200, steps=2)
        optimizer = masks.adamw(lr=0.01, lam=1e-5)
        loader = torch.utils.data.DataLoader(rows, batch_size=2)
        model, accelerator = masks.model, None
        if is_accelerated:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        betas = []
        for number, (part, wanted) in enumerate(loader, 1):
            with accelerator.accumulate(model) if accelerator else contextlib.nullcontext():
                loss = loss_of(name, model, part, wanted)
                accelerator.backward(loss) if accelerator else (loss / 2).backward()
                if accelerator or number % 2 == 0:
                    if accelerator is None or accelerator.sync_gradients:
                        clip = accelerator.clip_grad_norm_ if accelerator else nn.utils.clip_grad_norm_
                        clip(model.parameters(), 0.1)
                    optimizer.step()
                    optimizer.zero_grad()
            betas.append(masks.beta)
        assert betas == pytest.approx([BETA, 20.0, 20.0, 200.0], rel=1e-6)
        results.append([s.detach() for s in masks.scores().values()])
        masks.check_fresh()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def resumed_by_accelerate(name: str, folder: Path) -> None:
    """``accelerator.register_for_checkpointing(masks)`` and nothing else: the rest of the run has the bits."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    inputs, labels = batch_of(name)
    ends = []
    for is_resumed in (False, True):
        masks = masked(name)
        masks.anneal(to=200, steps=4)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(masks.model, masks.adamw(lr=0.01, lam=1e-5))
        accelerator.register_for_checkpointing(masks)
        if is_resumed:
            accelerator.load_state(str(folder))
        for step in range(2 * is_resumed, 4):
            if step == 2 and not is_resumed:
                accelerator.save_state(str(folder))
            accelerator.backward(loss_of(name, model, inputs, labels))
            optimizer.step()
            optimizer.zero_grad()
        assert masks.beta == 200.0
        ends.append([s.detach() for s in masks.scores().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


FEATURES: dict[str, Callable[..., None]] = {
    "fp32": in_fp32,
    "torch.compile(fullgraph=True)": under_torch_compile,
    "autocast bf16": functools.partial(under_autocast, dtype=torch.bfloat16),
    "autocast fp16": functools.partial(under_autocast, dtype=torch.float16),
    "bf16 weights, fp32 scores": in_bf16_weights,
    "gradient checkpointing": with_checkpointing,
    "gradient accumulation": with_accumulation,
    "gradient clipping": with_clipping,
    "copy.deepcopy": deep_copied,
    "torch.save of the module": pickled,
    "AveragedModel (EMA, SWA)": averaged,
    "torch.export after unmask": exported,
    "Accelerate": with_accelerate,
    "Accelerate's save_state": resumed_by_accelerate,
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", MODELS)
def test_works_with(name, feature, tmp_path):
    function = FEATURES[feature]
    function(name, tmp_path) if function is resumed_by_accelerate else function(name)


def test_a_grad_scaler_of_accelerate_unscales_before_the_penalty_and_a_skipped_step_leaves_beta_and_scores():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)  # makes the state that the wrapper looks at
    inputs, labels = batch_of("gpt2")
    scaled, own = masked("gpt2"), masked("gpt2")
    for masks in (scaled, own):
        masks.anneal(start=BETA, to=200, steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(scaled.adamw(lr=0.01, lam=1e-3), scaler=scaler)
    before = {name: s.detach().clone() for name, s in scaled.scores().items()}
    for is_overflow in (True, False):
        scaler.scale(loss_of("gpt2", scaled.model, inputs, labels)).backward()
        if is_overflow:
            next(iter(scaled.scores().values())).grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == is_overflow
        if is_overflow:
            assert scaled.beta == BETA and all(torch.equal(s, before[n]) for n, s in scaled.scores().items())
    plain = own.adamw(lr=0.01, lam=1e-3)
    loss_of("gpt2", own.model, inputs, labels).backward()
    plain.step()
    assert scaled.beta == own.beta == 20.0
    for a, b in zip(scaled.scores().values(), own.scores().values(), strict=True):
        assert (a - b).abs().max() <= 1e-5


def test_data_parallel_copies_are_refused():
    for name in MODELS:
        layer = next(iter(masked(name).layers.values()))
        with pytest.raises(RuntimeError, match=r"nn.DataParallel.*torchrun"):
            layer._replicate_for_data_parallel()  # what nn.parallel.replicate asks of each module


def test_the_page_has_the_table_and_its_loop_with_accelerate_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text()
    table = [line.split(" | ")[:5] for line in page.splitlines() if line.count("| yes") == len(MODELS)]
    assert {cells[0].removeprefix("| ") for cells in table} == {*FEATURES, "Trainer, resumed"}
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    (loop,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "Accelerator(" in code]
    exec(compile(loop, "huggingface.md", "exec"), {})
