"""One rank of the tests with several processes: `python -m tests.distributed.ranks RANK STORE` reads a scenario's name
and file from stdin, calls it and writes what it gives into the file, and so on. Scenarios run on every rank at once."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from subnets import DiscoveryConfig, discover, mask_model, masks_of
from subnets.distributed import TrainingState, check_same
from subnets.masking import MaskSet
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS, BATCH, STEPS, RATE, LAM = 2, 8, 6, 0.05, 2e-5
SHARE = BATCH // RANKS


# --- the task, on one rank or several --------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32, even: bool = False) -> nn.Sequential:
    """Either no number of rows is even, so that shards differ from rank to rank and end where a kernel's vectors do
    not: the last elements then take another way to the same value, to the last bit; or all shards are whole vectors,
    and nothing differs at all."""
    torch.manual_seed(0)
    filters, width, classes = (32, 32, 8) if even else (5, 33, 7)
    layers = nn.Conv2d(4, filters, 3), nn.ReLU(), nn.Flatten(), nn.Linear(filters * 16, width), nn.ReLU()
    return nn.Sequential(*layers, nn.Linear(width, classes)).to(dtype)


def batches(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Eight rows per step."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(BATCH, 4, 6, 6, generator=generator).to(dtype), torch.randint(0, 7, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def mask(model: nn.Module, unit: Any = "weight", keep: bool = True, score_init: float = -0.1) -> MaskSet:
    masks = mask_model(
        model, [nn.Conv2d, nn.Linear], unit=unit, score_init=score_init, keep_effective_weights=keep
    )
    masks.anneal(to=20, steps=STEPS)
    return masks


def parts_of(rank: int, world: int = RANKS) -> list[slice]:
    """Which rows of each batch this rank takes, one pass each: all of them, share by share, where it is alone."""
    ranks = range(RANKS) if world == 1 else [rank]
    return [slice(r * SHARE, r * SHARE + SHARE) for r in ranks]


def train(
    model: Callable[[Tensor], Tensor], masks: MaskSet, optimizer: torch.optim.Optimizer, steps: Sequence[int],
    parts: Sequence[slice], dtype: torch.dtype = torch.float32, lam: float = 0.0, clip: float | None = None,
) -> None:  # fmt: skip
    """Steps on the mean loss over the parts' rows; lam adds the penalty to the loss."""
    data = batches(dtype)
    for step in steps:
        x, y = data[step]
        for rows in parts:
            with masks.collect_penalty() if lam else contextlib.nullcontext() as penalty:
                out = model(x[rows])
            loss = F.cross_entropy(out.float() if dtype == torch.bfloat16 else out, y[rows])
            if penalty is not None:
                loss = loss + lam * penalty()
            (loss / len(parts)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(list(masks.scores().values()), clip)
        optimizer.step()
        optimizer.zero_grad()


def sharded(model: nn.Module, **kwargs: Any) -> nn.Module:
    """By fully_shard: the convolution and the first Linear alone, the last Linear with the root."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model[0], model[3]):  # type: ignore[index]
        fully_shard(part, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def whole_scores(masks: MaskSet) -> dict[str, Tensor]:
    return {name: whole_of(scores.detach()).clone() for name, scores in masks.scores().items()}


def whole_of(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def error_of(function: Callable[[], Any]) -> str:
    """How it was refused."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


# --- scenarios -------------------------------------------------------------------------------------------------------


def ddp(
    rank: int, dtype: str = "float32", lam: float = LAM, way: str = "optimizer", moments: str = "float32",
    compiled: bool = False, **kwargs: Any,
) -> Any:
    """Scores after a training with DistributedDataParallel."""
    masks = mask(network(getattr(torch, dtype)))
    model: Any = DistributedDataParallel(masks.model, **kwargs)
    model = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = masks.adamw(RATE, lam=lam if way == "optimizer" else 0.0, moment_dtype=getattr(torch, moments))
    in_loss = lam if way == "loss" else 0.0
    train(model, masks, optimizer, range(STEPS), parts_of(rank), getattr(torch, dtype), in_loss)
    check_same(masks)
    masks.check_fresh()
    return {"scores": whole_scores(masks), "kept": masks.kept(), "beta": masks.beta}


def ddp_accumulating(rank: int) -> Any:
    """Two passes per step on each rank, of which only the second one communicates."""
    masks = mask(network())
    model = DistributedDataParallel(masks.model)
    optimizer = masks.adamw(RATE, lam=LAM)
    for x, y in batches():
        first = rank * SHARE
        with model.no_sync():
            (F.cross_entropy(model(x[first : first + 2]), y[first : first + 2]) / 2).backward()
        (F.cross_entropy(model(x[first + 2 : first + 4]), y[first + 2 : first + 4]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    check_same(masks)
    return whole_scores(masks)


def ddp_takes_rank_0s_tensors(rank: int) -> Any:
    """Ranks that start from different scores, with effective weights of their own already made."""
    masks = mask(network(), score_init=0.1 * (rank + 1))
    x = batches()[0][0]
    masks.model(x)
    before = error_of(lambda: check_same(masks))
    model = DistributedDataParallel(masks.model)
    check_same(masks)
    masks.check_fresh()
    out = model(x).detach()
    return {"before": before, "out": out, "scores": whole_scores(masks)}


def differing(rank: int) -> Any:
    """What check_same says when rank 1 differs, in one score or in beta."""
    masks = mask(network())
    with torch.no_grad():
        masks.layers["3.weight"].scores[3, 4] += 1e-6 * rank
    of_scores = error_of(lambda: check_same(masks))
    with torch.no_grad():
        masks.layers["3.weight"].scores.fill_(-0.1)
    masks.beta = 2.0 + rank
    return of_scores, error_of(lambda: check_same(masks))


def refused(rank: int) -> dict[str, str]:
    """What can't work in several processes, by name."""
    said = {}
    masks = mask(network())
    said["in_backward"] = error_of(lambda: masks.adamw(in_backward=True))
    said["batch_score_gradients"] = error_of(lambda: masks.batch_score_gradients().__enter__())
    x, y = batches()[0]
    config = DiscoveryConfig(epochs=1)
    said["discover"] = error_of(lambda: discover(network(), [x], lambda m, b: m(b).sum(), config))
    said["mask after DDP"] = error_of(lambda: mask_model(DistributedDataParallel(network())))
    said["mask after DDP of a part"] = error_of(lambda: mask_model(nn.Sequential(DistributedDataParallel(network()))))
    said["mask after FSDP"] = error_of(lambda: mask_model(sharded(network())))
    early = masks.adamw(RATE)
    model = sharded(masks.model)
    F.cross_entropy(model(x), y).backward()
    said["optimizer before FSDP"] = error_of(early.step)
    masks = masks_of(model)
    said["unmask"] = error_of(masks.unmask)
    said["audit"] = error_of(lambda: masks.audit(x))
    said["str"] = str(masks)
    with masks.collect_penalty() as penalty:
        model[3](torch.zeros(1, 80))
    said["penalty of what did not run"] = error_of(penalty)
    cast = sharded(mask(network()).model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    said["param_dtype"] = error_of(lambda: cast(x))
    parameters = mask_model(network(), fused=False).model
    parameters = sharded(parameters, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    said["param_dtype of a parameter"] = error_of(lambda: parameters(x))
    both = mask(network(torch.bfloat16)).model
    both.requires_grad_(True)
    both = sharded(both)
    said["two dtypes train"] = error_of(lambda: both(x.bfloat16()))
    return said


def names(rank: int) -> list[str]:
    return list(masks_of(DistributedDataParallel(mask(network()).model)).layers)


def fsdp(
    rank: int, unit: str = "weight", dtype: str = "float32", even: bool = False, clip: float | None = None,
    way: str = "optimizer", plan: str = "recompute", compiled: bool = False,
) -> Any:
    """What a training with fully_shard leaves."""
    kind = getattr(torch, dtype)
    masks = mask(network(kind, even), unit)
    weights = {name: layer.weight.detach().clone() for name, layer in masks.layers.items()}
    model = sharded(masks.model)
    with torch.no_grad():
        model(batches(kind)[0][0])  # leaves the root's parameters whole
    optimizer = masks.adamw(RATE, lam=LAM if way == "optimizer" else 0.0)
    plans = {layer.plan for layer in masks.layers.values()}
    for layer in masks.layers.values():
        layer.plan = plan
    called: Any = torch.compile(model, backend="aot_eager") if compiled else model
    train(called, masks, optimizer, range(STEPS), parts_of(rank), kind, LAM if way == "loss" else 0.0, clip)
    kept = [layer._slot.w_eff is not None for layer in masks.layers.values()]
    check_same(masks)
    masks.check_fresh()
    local = [state["exp_avg"].to_local().numel() for state in optimizer.state.values()]
    same = all(torch.equal(whole_of(layer.weight.detach()), weights[n]) for n, layer in masks.layers.items())
    with masks.hard(), torch.no_grad():
        hard_out = model(batches(kind)[0][0])
    subnet = masks.subnet(ranks=True)
    return {
        "scores": whole_scores(masks), "hard_out": hard_out, "density": masks.density(), "kept": subnet.masks,
        "undecided": masks.undecided(), "base_hash": subnet.base_hash, "ranks": subnet.ranks,
        "architecture": subnet.provenance["architecture"], "moments_here": sum(local),
        "keeps_effective_weights": any(kept), "plans": plans, "weights_are_unchanged": same,
    }  # fmt: skip


def fsdp_from_meta(rank: int) -> Any:
    """A training of a network that was never whole on any rank until its weights were loaded, shard by shard."""
    with torch.device("meta"):
        masks = mask(network())
    model = sharded(masks.model)
    model.to_empty(device="cpu")
    for scores in masks.scores().values():
        nn.init.constant_(scores, -0.1)
    set_model_state_dict(model, network().state_dict(), options=StateDictOptions(full_state_dict=True, strict=False))
    train(model, masks, masks.adamw(RATE, lam=LAM), range(STEPS), parts_of(rank))
    return whole_scores(masks)


class Tied(nn.Module):
    """An embedding that is the output head too, and attention: masks that whoever reads the parameter gets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def tied() -> MaskSet:
    torch.manual_seed(0)
    targets = ["embedding.weight", "attention.in_proj_weight", "attention.out_proj"]
    return mask_model(Tied().double(), targets, keep_effective_weights=False)


def train_tied(model: nn.Module, masks: MaskSet, parts: Sequence[slice]) -> dict[str, Tensor]:
    masks.anneal(to=20, steps=3)
    optimizer = masks.adamw(RATE, lam=LAM)
    for step in range(3):
        tokens = torch.randint(0, 11, (BATCH, 5), generator=torch.Generator().manual_seed(step))
        for rows in parts:
            out = model(tokens[rows])
            (F.cross_entropy(out.flatten(0, 1), tokens[rows].flatten()) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_scores(masks)


def tied_of(rank: int, wrap: str) -> Any:
    """Scores after a training, and after the state dict was loaded into itself."""
    masks = tied()
    if wrap == "ddp":
        return train_tied(DistributedDataParallel(masks.model), masks, parts_of(rank)), masks.kept()
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(masks.model.attention, mesh=mesh)  # type: ignore[arg-type]
    model = fully_shard(masks.model, mesh=mesh)
    model.load_state_dict(model.state_dict())
    return train_tied(model, masks, parts_of(rank)), masks.subnet().masks


def gpt2(dtype: torch.dtype = torch.float32) -> MaskSet:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 16}
    torch.manual_seed(0)
    config = GPT2Config(**sizes, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, bos_token_id=0, eos_token_id=0)
    return mask_model(GPT2LMHeadModel(config).to(dtype))


def train_gpt2(model: nn.Module, masks: MaskSet, parts: Sequence[slice]) -> dict[str, Tensor]:
    masks.anneal(to=20, steps=3)
    optimizer = masks.adamw(RATE, lam=LAM)
    for step in range(3):
        tokens = torch.randint(0, 50, (BATCH, 12), generator=torch.Generator().manual_seed(step))
        for rows in parts:
            (model(input_ids=tokens[rows], labels=tokens[rows]).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole_scores(masks)


def gpt2_of(rank: int, wrap: str) -> Any:
    """transformers' GPT-2: transposed weights, a head that shares the embedding's weight."""
    masks = gpt2()
    net: Any = masks.model
    if wrap == "ddp":
        return train_gpt2(DistributedDataParallel(net), masks, parts_of(rank))
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in net.transformer.h:
        fully_shard(block, mesh=mesh)
    return train_gpt2(fully_shard(net, mesh=mesh), masks, parts_of(rank))


def train_by_trainer(world: int, folder: str) -> dict[str, Tensor]:
    """By Hugging Face's Trainer, eight rows a step whatever the number of ranks."""
    from subnets.trainer import MaskCallback
    from transformers import Trainer, TrainingArguments

    masks = gpt2(torch.float64)
    masks.anneal(to=20, steps=4)
    rows = [{"input_ids": x, "labels": x} for x in (torch.arange(64)[:, None] + 3 * torch.arange(8)) % 50]
    args = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=BATCH // world, lr_scheduler_type="constant", max_grad_norm=0,
        report_to="none", use_cpu=True, disable_tqdm=True, eval_strategy="steps", eval_steps=2, save_steps=2,
        logging_steps=1,
    )  # fmt: skip
    rest: Any = {"optimizers": (masks.adamw(RATE, lam=LAM), None), "callbacks": [MaskCallback(masks)]}
    Trainer(masks.model, args, train_dataset=rows, eval_dataset=rows, **rest).train()
    check_same(masks)
    return whole_scores(masks)


def trainer(rank: int, folder: str) -> Any:
    return train_by_trainer(RANKS, folder)


def fsdp_edited(rank: int) -> tuple[Tensor, Tensor]:
    """The output after sharded scores were written in place, and the one before."""
    masks = mask(network())
    model = sharded(masks.model)
    masks = masks_of(model)
    x = batches()[0][0]
    with torch.no_grad():
        before = model(x)
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        for scores in masks.scores().values():
            scores.fill_(1.0)
        return model(x), before


def saving(rank: int, wrap: str, folder: str) -> Any:
    """The first half of a training, to a checkpoint."""
    masks, model, optimizer = wrapped(wrap)
    train(model, masks, optimizer, range(STEPS // 2), parts_of(rank), clip=0.01)
    dcp.save({"masks": TrainingState(model, masks, optimizer)}, checkpoint_id=folder)
    return None


def resuming(rank: int, wrap: str, folder: str) -> Any:
    """The second half, from a checkpoint."""
    masks, model, optimizer = wrapped(wrap)
    return resume(rank, RANKS, masks, model, optimizer, folder)


def wrapped(wrap: str) -> tuple[MaskSet, nn.Module, torch.optim.Optimizer]:
    masks = mask(network(), keep=wrap == "ddp")
    model = DistributedDataParallel(masks.model) if wrap == "ddp" else sharded(masks.model)
    return masks, model, masks.adamw(RATE, lam=LAM)


def resume(
    rank: int, world: int, masks: MaskSet, model: nn.Module, optimizer: torch.optim.Optimizer, folder: str
) -> Any:
    dcp.load({"masks": TrainingState(model, masks, optimizer)}, checkpoint_id=folder)
    train(model, masks, optimizer, range(STEPS // 2, STEPS), parts_of(rank, world), clip=0.01)
    return {"scores": whole_scores(masks), "beta": masks.beta}


def script(rank: int, text: str, flags: list[str], folder: str) -> None:
    """A script of the docs, in the group of processes that there is."""
    os.chdir(folder)
    with (
        mock.patch.object(sys, "argv", ["train.py", *flags]), mock.patch.object(dist, "init_process_group"),
        mock.patch.object(dist, "destroy_process_group"),
    ):  # fmt: skip
        exec(compile(text, "train.py", "exec"), {"__name__": "__main__"})


# --- the process -----------------------------------------------------------------------------------------------------


def main() -> None:
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=240)
    )
    for line in sys.stdin:
        order = json.loads(line)
        try:
            result = {"result": globals()[order["scenario"]](rank, **order["kwargs"])}
        except BaseException:
            result = {"error": traceback.format_exc()}
        torch.save(result, Path(order["file"]))
        print("done", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
