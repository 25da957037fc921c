"""Data modules: what a model is trained and judged on."""

from seqzoo.train.data.folder_bytes import FolderBytes as FolderBytes
