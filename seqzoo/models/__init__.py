"""Models over any mixers: their configurations, the stack of blocks, the models on it, generation."""

from seqzoo.models.backbone import Backbone as Backbone
from seqzoo.models.block import Block as Block
from seqzoo.models.classifier import SequenceClassifier as SequenceClassifier
from seqzoo.models.config import BackboneConfig as BackboneConfig
from seqzoo.models.config import ClassifierConfig as ClassifierConfig
from seqzoo.models.config import ModelConfig as ModelConfig
from seqzoo.models.generation import generate as generate
from seqzoo.models.generation import stream as stream
from seqzoo.models.language_model import LanguageModel as LanguageModel
