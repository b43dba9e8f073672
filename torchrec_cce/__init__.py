"""Clustered Compositional Embeddings for TorchRec: categorical features with huge universes in tiny tables.

A name is imported when it is first used, so that who only wants maps, or a command's help, does not wait for torch. The
names of each package are listed once, in the `.pyi` beside its `__init__.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
