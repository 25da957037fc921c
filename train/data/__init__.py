"""Data modules: what a model is trained and judged on."""

from seqzoo.train.data.documents import FolderDocuments as FolderDocuments
from seqzoo.train.data.documents import PackedBatch as PackedBatch
from seqzoo.train.data.folder_bytes import FolderBytes as FolderBytes
from seqzoo.train.data.packed_batches import PackedBatchSampler as PackedBatchSampler
from seqzoo.train.data.packed_batches import pack_lengths as pack_lengths
