"""Trains a language model on sequences that lie on several processes, with nothing but PyTorch and SeqZoo.

    torchrun --nproc-per-node 4 examples/sequence_parallel.py --sequence-parallel 2

The losses that it prints are the same for every number of processes: the batches do not depend on it.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

from seqzoo.models import LanguageModel, ModelConfig
from seqzoo.parallel import Plan, next_tokens, shard_model, training_mesh

parser = argparse.ArgumentParser()
parser.add_argument("--sequence-parallel", type=int, default=1, help="processes that share a sequence")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--batch-size", type=int, default=4, help="sequences of a step, over all processes")
parser.add_argument("--context", type=int, default=512, help="tokens of a sequence")
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
if on_gpu:
    torch.cuda.set_device(dist.get_node_local_rank())
mesh = training_mesh(options.sequence_parallel, "cuda" if on_gpu else "cpu")
replica, replicas = mesh.get_local_rank("data_parallel"), mesh.size(0)
rank, ranks = mesh.get_local_rank("sequence_parallel"), mesh.size(1)

# any pattern of mixers; the first process's parameters are all processes'
torch.manual_seed(0)
pattern = ["mamba2", "gated_deltanet", {"name": "attention", "n_heads": 4}]
model = LanguageModel(ModelConfig(vocab_size=256, d_model=64, n_layers=3, pattern=pattern))
shard_model(model, mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# the text of this library, one byte a token
files = sorted(Path(__file__).parent.parent.joinpath("seqzoo").rglob("*.py"))
data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)

for step in range(options.steps):
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - options.context, (options.batch_size,), generator=generator)
    # the sequences of this group of processes, the same on all of it
    ids = torch.stack([data[start : start + options.context] for start in starts[replica::replicas]])
    ids = ids.long().to(mesh.device_type)
    labels = next_tokens(ids)  # before the tokens are divided: the last one's label lies on the next rank
    plan = Plan.balanced(options.context, ranks, rank)
    loss = model.loss(plan.shard(ids), plan.shard(labels), cu_seqlens=plan)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)  # for the eye alone: gradients are summed already
    if dist.get_rank() == 0:
        print(f"step {step} loss {total.item():.5f}", flush=True)
dist.destroy_process_group()
