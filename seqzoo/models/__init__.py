"""Models over any mixers: their configuration, the stack of blocks, the language model."""

from seqzoo.models.backbone import Backbone as Backbone
from seqzoo.models.block import Block as Block
from seqzoo.models.config import ModelConfig as ModelConfig
from seqzoo.models.language_model import LanguageModel as LanguageModel
