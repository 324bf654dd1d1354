import torch
from subnets import mask_model
from subnets.trainer import MaskCallback
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.manual_seed(0)
config = GPT2Config(vocab_size=16, n_positions=8, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)  # for a trained one: GPT2LMHeadModel.from_pretrained("gpt2")
data = [{"input_ids": x, "labels": x} for x in (torch.arange(512)[:, None] + 3 * torch.arange(8)) % 16]

masks = mask_model(model)
masks.anneal(to=200, steps=200)
args = TrainingArguments("runs/gpt2", max_steps=200, lr_scheduler_type="constant", max_grad_norm=0, report_to="none")
optimizers = masks.adamw(lr=0.02, lam=1e-6), None
trainer = Trainer(model, args, train_dataset=data, optimizers=optimizers, callbacks=[MaskCallback(masks)])
trainer.train()
print("loss of the hard masks:", trainer.evaluate(data)["eval_loss"], masks)
masks.subnet(task="count by threes").save("subnet.safetensors", weights=masks.unmask())
