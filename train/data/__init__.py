"""Data modules: what a model is trained and judged on."""

from seqzoo.train.data.corpus import Corpus as Corpus
from seqzoo.train.data.diagnostic_data import Diagnostic as Diagnostic
from seqzoo.train.data.documents import FolderDocuments as FolderDocuments
from seqzoo.train.data.folder_bytes import FolderBytes as FolderBytes
from seqzoo.train.data.language import LanguageData as LanguageData
from seqzoo.train.data.lra import GeneratedPathfinder as GeneratedPathfinder
from seqzoo.train.data.lra import GreyImage as GreyImage
from seqzoo.train.data.lra import ListOps as ListOps
from seqzoo.train.data.lra import Retrieval as Retrieval
from seqzoo.train.data.lra import Text as Text
from seqzoo.train.data.packed_batches import PackedBatchSampler as PackedBatchSampler
from seqzoo.train.data.packed_batches import pack_lengths as pack_lengths
from seqzoo.train.data.packed_documents import PackedBatch as PackedBatch
