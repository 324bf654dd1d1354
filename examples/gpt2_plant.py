from subnets import Subnet, transfer
from transformers import GPT2Config, GPT2LMHeadModel

config = GPT2Config(vocab_size=16, n_positions=8, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
other = GPT2LMHeadModel(config)
transfer(Subnet.load("subnet.safetensors"), source=None, target=other)  # its values are in the file
