"""Models over any mixers: their configuration, the stack of blocks, the language model, generation."""

from seqzoo.models.backbone import Backbone as Backbone
from seqzoo.models.block import Block as Block
from seqzoo.models.config import ModelConfig as ModelConfig
from seqzoo.models.generation import generate as generate
from seqzoo.models.generation import stream as stream
from seqzoo.models.language_model import LanguageModel as LanguageModel
