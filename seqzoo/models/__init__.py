"""Models over any mixers: their configurations, the stack of blocks, the models on it, generation."""

from seqzoo.models.backbone import Backbone as Backbone
from seqzoo.models.block import Block as Block
from seqzoo.models.classifier import SequenceClassifier as SequenceClassifier
from seqzoo.models.config import BackboneConfig as BackboneConfig
from seqzoo.models.config import ClassifierConfig as ClassifierConfig
from seqzoo.models.config import ModelConfig as ModelConfig
from seqzoo.models.continuations import log_likelihoods as log_likelihoods
from seqzoo.models.continuations import score as score
from seqzoo.models.dual_encoder import DualEncoder as DualEncoder
from seqzoo.models.generation import generate as generate
from seqzoo.models.generation import stream as stream
from seqzoo.models.language_model import LanguageModel as LanguageModel
from seqzoo.models.long_sequences import backward_in_chunks as backward_in_chunks
from seqzoo.models.parallel_mixers import ParallelMixers as ParallelMixers
from seqzoo.models.presets import create_model as create_model
from seqzoo.models.presets import list_models as list_models
from seqzoo.models.presets import preset as preset
from seqzoo.models.recurrent_memory import RecurrentMemory as RecurrentMemory
from seqzoo.models.recurrent_memory import RecurrentMemoryConfig as RecurrentMemoryConfig
