"""Sequence parallel: one sequence, or packed ones, on several ranks."""

from seqzoo.parallel.attention import attention_payload as attention_payload
from seqzoo.parallel.attention import parallel_attention as parallel_attention
from seqzoo.parallel.exchange import SequenceParallelError as SequenceParallelError
from seqzoo.parallel.exchange import keep_exchanges as keep_exchanges
from seqzoo.parallel.layout import Layout as Layout
from seqzoo.parallel.layout import zigzag as zigzag
from seqzoo.parallel.loss import next_tokens as next_tokens
from seqzoo.parallel.parallelize import exchanges_of as exchanges_of
from seqzoo.parallel.parallelize import parallelize as parallelize
from seqzoo.parallel.parallelize import payload_bytes as payload_bytes
from seqzoo.parallel.parallelize import sum_gradients as sum_gradients
from seqzoo.parallel.pipeline import PipelineLoss as PipelineLoss
from seqzoo.parallel.pipeline import split_stages as split_stages
from seqzoo.parallel.pipeline import sum_tied_gradients as sum_tied_gradients
from seqzoo.parallel.plan import Plan as Plan
from seqzoo.parallel.recipe import shard_model as shard_model
from seqzoo.parallel.recipe import training_mesh as training_mesh
