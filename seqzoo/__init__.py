"""SeqZoo: a zoo of sequence models behind one interface."""

from pathlib import Path as _Path

from seqzoo.version import __version__ as __version__

# In a checkout kernels/, train/, eval/ and configs/ lie beside this package and are linked into it; in a wheel they lie
# inside it. Where the links were lost (Windows, some archives), look one directory up.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parents[1]))
