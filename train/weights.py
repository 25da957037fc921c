"""Training that begins with the weights of an earlier model, to tune it or to go from easy examples to hard ones."""

from __future__ import annotations

from seqzoo.hub import from_pretrained
from seqzoo.hub.saving import find_checkpoint
from seqzoo.models.tokenizer import FILE, ByteTokenizer, load_tokenizer
from seqzoo.train.checkpoints import difference
from seqzoo.train.configuration import ConfigurationError
from seqzoo.train.data.language import LanguageData
from seqzoo.train.options import TrainingCLI


def begin_with_weights(cli: TrainingCLI) -> None:
    """Puts the weights that the configuration names, if any, into the model; their place becomes an absolute path.

    Raises:
        ConfigurationError: If there is no model, or one of other tensors or another tokenizer.
    """
    if cli.config.weights is None:
        return
    try:
        folder = find_checkpoint(cli.config.weights).resolve()
        weights = from_pretrained(folder).state_dict()
        tokenizer = load_tokenizer(folder) if (folder / FILE).is_file() else ByteTokenizer()
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"weights={cli.config.weights!r} cannot be read: {error}") from error
    other = difference(cli.model.model.state_dict(), weights)
    if other is not None:
        name, ours, theirs = other
        raise ConfigurationError(
            f"the weights in {folder} are of another model: the shape of {name} is {theirs} there and {ours} in this "
            "configuration; give the model.config of the run that they come from"
        )
    data = cli.datamodule
    if isinstance(data, LanguageData) and data.tokenizer.digest() != tokenizer.digest():
        raise ConfigurationError(
            f"the weights in {folder} are of another tokenizer, of fingerprint {tokenizer.digest()}; the data have "
            f"{data.tokenizer_words}, {data.tokenizer.digest()}: give the tokenizer of the weights"
        )
    cli.model.model.load_state_dict(weights)
    cli.config.weights = str(folder)
