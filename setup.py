"""kernels/, train/, eval/ and configs/ lie beside seqzoo/ and ship inside it, as seqzoo.kernels and so on."""

from setuptools import find_namespace_packages, setup

SIBLINGS = ("kernels", "train", "eval", "configs")

packages = find_namespace_packages(include=["seqzoo", "seqzoo.*"], exclude=[f"seqzoo.{name}*" for name in SIBLINGS])
for sibling in SIBLINGS:
    packages += [f"seqzoo.{name}" for name in find_namespace_packages(include=[sibling, f"{sibling}.*"])]

setup(
    packages=[name for name in packages if "__pycache__" not in name],
    package_dir={f"seqzoo.{name}": name for name in SIBLINGS},
)
