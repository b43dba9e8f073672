"""Cluster the tables of a checkpoint, publish the maps, and write the checkpoint to train on from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
