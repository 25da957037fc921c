"""Saving and loading of models, published weights, and files that appear whole or not at all."""

from seqzoo.hub.files import WriteError as WriteError
from seqzoo.hub.files import atomic_file as atomic_file
from seqzoo.hub.files import atomic_folder as atomic_folder
from seqzoo.hub.pretrained import export_pretrained as export_pretrained
from seqzoo.hub.pretrained import load_pretrained as load_pretrained
from seqzoo.hub.saving import from_pretrained as from_pretrained
from seqzoo.hub.saving import save_pretrained as save_pretrained
